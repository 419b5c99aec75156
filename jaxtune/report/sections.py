"""The parts of a report: each a function from a run's files to HTML, '' where there is nothing to tell."""

import html
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.common.formatting import amount, duration, size
from jaxtune.report.charts import Series, chart, smooth
from jaxtune.report.source import Source

_SHOWN_SAMPLES, _MOST_SAMPLES, _MOST_CHARS = 6, 40, 2000

# The order and the words of the phases that `RunInfo.timed` is given.
_PHASES = {
    'step': ('training steps', 'step'),
    'compile': ('compiling', 'compile'),
    'eval': ('evaluating', 'eval-phase'),
    'data': ('reading data', 'data'),
    'checkpoint': ('checkpoints', 'checkpoint'),
    'load': ('loading the model', 'load'),
    'export': ('exporting', 'export'),
    'generate': ('generating', 'eval-phase'),
    'reward': ('scoring answers', 'data'),
    'collect': ('collecting', 'load'),
    'tokenizer': ('training the tokenizer', 'compile'),
    'tokenise': ('tokenising', 'step'),
    'near-duplicates': ('finding near-duplicates', 'eval-phase'),
    'decide': ('deciding what stays', 'checkpoint'),
    'windows': ('reading runs of words', 'data'),
    'substrings': ('finding substrings', 'data'),
    'build': ('building the set', 'export'),
}

_TITLES = {
    'loss': 'Loss',
    'learning_rate': 'Learning rate',
    'grad_norm': 'Gradient norm',
    'tokens_per_second': 'Tokens a second',
    'mfu': 'Model FLOPs utilisation',
    'peak_bytes': 'Peak memory',
    'kl': 'KL from the reference',
    'approx_kl': 'KL from the policy that answered',
    'ended': 'Answers that came to an end',
    'length': 'Tokens an answer',
    'reward_std': 'Spread of the rewards',
    'value_explained': 'Share of the returns foreseen',
    'groups_alike': 'Groups with nothing to tell apart',
}
_FIRST = ('reward', 'accuracy', 'kl', 'entropy', 'length', 'ended')
_FIRST += ('learning_rate', 'grad_norm', 'tokens_per_second', 'mfu', 'peak_bytes')
# What another chart shows already, or what does not change.
_NO_CHART = ('step_seconds', 'perplexity', 'bits_per_byte', 'gzip_bits_per_byte', 'tokens', 'pairs', 'answers')


def text(value: Any) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))


def number(value: float) -> str:
    """A metric with four digits, or whole."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e12):
        return f'{value:,.0f}'
    if value == 0:
        return '0'
    return f'{value:.2e}'.replace('e-0', 'e-') if abs(value) < 1e-3 else f'{value:#.4g}'


def axis(value: float) -> str:
    """A tick's label: short."""
    if abs(value) >= 1000:
        return amount(value)
    return f'{value:.0e}'.replace('e-0', 'e-') if 0 < abs(value) < 1e-3 else f'{value:g}'


def percent(value: float) -> str:
    return f'{100 * value:.1f} %' if 0 < abs(value) < 0.0995 else f'{100 * value:.0f} %'


def _how(name: str) -> tuple[str, Callable[[float], str]]:
    """The unit of a metric and how it is shown, by its name."""
    if name.endswith('bytes'):
        return 'bytes', size
    if name.endswith(('mfu', 'accuracy', 'exact_match', 'fraction', 'share', 'longer_is_better', 'ended', 'alike')):
        return 'percent', percent
    return '', number


def title(name: str) -> str:
    """A metric's name in words: `eval/bits_per_byte` -> `Bits per byte`."""
    last = name.rsplit('/', 1)[-1]
    return _TITLES.get(last, last.replace('_', ' ').capitalize())


def lead(source: Source) -> str:
    """One sentence on what was done."""
    key, model, steps = source.key, source.run.get('model') or {}, source.result.get('step')
    if source.task == 'prepare':
        names = _short(key('data.train')) if key('data.train') else ', '.join(source.stats.get('sources') or ())
        collected, kept = source.metric('data/collected_documents'), source.metric('data/documents')
        of = f': {kept:,} of {collected:,} documents stay' if collected and kept is not None else ''
        return f'Text from {text(names or "its sources")}, made ready for training{of}.'
    if source.task == 'generate':
        return f'Completions by {text(_short(key("model.path")))} of prompts from {text(_short(key("data.eval")))}.'
    if source.task == 'evaluate':
        return f'{text(_short(key("model.path")))} scored on {text(_short(key("data.eval")))}.'
    if source.task != 'train' and not source.rewarded:
        return ''
    kind = key('model.config.model_type') or model.get('family') or 'model'
    words = [f'{"An" if kind[0] in "aeio" else "A"} {text(kind)}']
    if model.get('parameters'):
        words.append(f'of {amount(model["parameters"])} parameters')
        if model.get('layers') and model.get('d_model'):
            words.append(f'({model["layers"]} layers, width {model["d_model"]:,})')
    path = key('model.path')
    words.append(f'trained from {"the weights of " + text(_short(path)) if path else "scratch"}')
    words.append(f'on {text(_short(key("data.train", "its data")))}')
    if source.rewarded:
        words.append(f'by {source.task.upper()} for {steps or 0:,} steps of {key("rl.rollouts", "some")} answers,')
        words.append(f'each scored by {text(_short(key("rl.reward")))},')
    elif steps:
        words.append(f'for {steps:,} updates')
        if tokens := source.run.get('tokens_per_step'):
            words.append(f'of {tokens:,} tokens ({amount(steps * tokens)} in all)')
    machine = source.run.get('hardware') or {}
    if machine:
        words.append(f'on {text(device_words(machine))}')
    return ' '.join(words) + '.'


def _short(path: Any) -> str:
    """The end of a long path; the name of a stage."""
    parts = str(path).removeprefix('@').rstrip('/').split('/')
    return '/'.join(parts[-2:]) if len(parts) > 3 else '/'.join(parts)


def device_words(machine: Mapping[str, Any]) -> str:
    if machine.get('platform') == 'cpu':
        virtual = f' as {machine["devices"]} devices' if machine.get('devices', 1) > 1 else ''
        return f'{machine.get("cores")} CPU cores{virtual}'
    return f'{machine.get("devices")} x {machine.get("device_kind")}'


def tiles(source: Source, seconds: float | None = None) -> str:
    """The headline numbers; `seconds` stands for the time of several runs together."""
    made = []
    metric = source.metric
    if source.rewarded:
        made += _reward_tiles(source)
    elif (loss := metric('eval/loss')) is not None:
        made.append(('Held-out loss', f'{loss:.3f} <small>nats</small>', _best_note(source, loss), ''))
    elif (loss := metric('train/loss')) is not None:
        made.append(('Training loss', f'{loss:.3f} <small>nats</small>', 'the last one logged', ''))
    if (perplexity := metric('eval/perplexity')) is not None:
        made.append(('Perplexity', number(perplexity), 'e to the loss', ''))
    if (bits := metric('eval/bits_per_byte')) is not None:
        made.append(('Bits per byte', f'{bits:.3f}', *_against_gzip(bits, source.gzip)))
    if (accuracy := metric('eval/accuracy')) is not None:
        longer = metric('eval/longer_is_better')
        note = '' if longer is None else f'always the longer answer: {percent(longer)}'
        made.append((title('accuracy'), percent(accuracy), note, ''))
    if source.task == 'prepare':
        counts = {'documents': 'Documents', 'train_tokens': 'Training tokens', 'eval_tokens': 'Held-out tokens'}
        for name, words in counts.items():
            if value := metric(f'data/{name}'):
                made.append((words, amount(value), '', ''))
        if (ratio := metric('data/bytes_per_token')) is not None:
            made.append(('Bytes a token', f'{ratio:.2f}', 'of UTF-8', ''))
        if source.gzip is not None:
            made.append(('gzip -9', f'{source.gzip:.3f}', 'bits per held-out byte', ''))
    if source.task == 'generate' and source.samples:
        made.append(('Completions', f'{len(source.samples):,}', '', ''))
    if (speed := source.tokens_per_second) is not None:
        mfu = source.curves.get('train/mfu')
        middle = sorted(value for _, value in mfu)[len(mfu) // 2] if mfu else None
        note = f'{percent(middle)} of peak FLOPs' if middle is not None else 'median'
        made.append(('Tokens a second', f'{speed:,.0f}', note, ''))
    if seconds is not None:
        made.append(('Time', _spaced(duration(seconds)), 'all stages', ''))
    elif 'seconds' in source.run:
        runs = source.run.get('runs', 1)
        note = f'over {runs} runs' if runs > 1 else 'from start to report'
        made.append(('Time', _spaced(duration(source.run['seconds'])), note, ''))
    cells = (
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd>{extra}{f"<p>{note}</p>" if note else ""}</div>'
        for name, value, note, extra in made
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>' if made else ''


def _reward_tiles(source: Source) -> list[tuple[str, str, str, str]]:
    """The reward of held-out prompts' answers, or of those that were learnt from, and how far the policy has gone."""
    made = []
    for name, words in (('eval/reward', 'Held-out reward'), (f'{source.task}/reward', 'Reward in training')):
        curve = source.curves.get(name)
        if curve and not made:
            made.append((words, number(curve[-1][1]), f'{number(curve[0][1])} at step {curve[0][0]:,.0f}', ''))
    if (away := source.metric(f'{source.task}/kl')) is not None:
        made.append((title('kl'), f'{number(away)} <small>nats</small>', 'an answer, at the last step', ''))
    return made


def _spaced(words: str) -> str:
    """`5 min 12 s` with its units small."""
    return ' '.join(word if word[0].isdigit() else f'<small>{word}</small>' for word in words.split())


def _best_note(source: Source, loss: float) -> str:
    curve = source.curves.get('eval/loss')
    if not curve or len(curve) < 2:
        return f'a {_counted(source)}'
    step, best = min(curve, key=lambda point: point[1])
    return f'best {best:.3f} at update {step:,.0f}' if best < loss - 5e-4 else 'the best of the run'


def _counted(source: Source) -> str:
    """What a loss is a mean over."""
    return 'pair' if source.metric('eval/pairs') is not None else 'scored token'


def _against_gzip(bits: float, gzip: float | None) -> tuple[str, str]:
    if not gzip:
        return 'of held-out text', ''
    widest = max(bits, gzip)
    bars = ''.join(f'<i style="width:{100 * value / widest:.1f}%"></i>' for value in (bits, gzip))
    change = 1 - bits / gzip
    note = f'{abs(change):.0%} {"below" if change > 0 else "above"} the {gzip:.3f} of gzip -9'.replace('%', ' %')
    return note, f'<div class="versus" aria-hidden="true">{bars}</div>'


def charts(source: Source) -> str:
    """The loss, large, and all other curves, small."""
    by_name: dict[str, list[str]] = {}
    for metric in source.curves:
        by_name.setdefault(metric.rsplit('/', 1)[-1], []).append(metric)
    drawn = [] if source.rewarded else [_loss_chart(source)]
    if not source.rewarded:
        by_name.pop('loss', None)
    names = [name for name in _FIRST if name in by_name]
    names += [name for name in sorted(by_name) if name not in names and name not in _NO_CHART]
    for name in names:
        metrics = [metric for metric in by_name[name] if len(source.curves[metric]) > 1]
        unit, show = _how(name)
        series = [
            Series(
                metric.split('/')[0] if len(metrics) > 1 else metric,
                source.curves[metric],
                'eval' if metric.startswith('eval/') else 'train' if len(metrics) > 1 else 'plain',
                'dots' if metric.startswith('eval/') else 'line',
            )
            for metric in metrics
        ]
        show_axis = {'': axis, 'percent': lambda share: f'{100 * share:.3g} %'}.get(unit, show)
        kind = 'zero' if unit or name in ('learning_rate', 'tokens_per_second') else ''
        large = source.rewarded and name == 'reward'
        drawn.append(chart(title(name), series, show, show_axis, unit=unit, kind=kind, large=large))
    drawn = [figure for figure in drawn if figure]
    by = 'step' if source.rewarded else 'update'
    return f'<h3>Curves, by {by}</h3><div class="charts">{"".join(drawn)}</div>' if drawn else ''


def _loss_chart(source: Source) -> str:
    train, held_out = source.curves.get('train/loss', []), source.curves.get('eval/loss', [])
    if len(train) < 2 and len(held_out) < 2:
        return ''
    series = [Series('', train, 'train', 'faint')] if len(train) > 20 else []
    series.append(Series('training, smoothed' if series else 'training', smooth(train) if series else train))
    series.append(Series('held out', held_out, 'eval', 'dots'))
    mark = None
    if held_out:
        step, best = min(held_out, key=lambda point: point[1])
        mark = (step, best, f'best {best:.3f} at {step:,.0f}')
    return chart(
        f'Loss, nats a {_counted(source).split()[-1]}', series, number, axis, kind='log', large=True, mark=mark
    )


def time_spent(source: Source) -> str:
    """The phases as one bar."""
    phases = {name: seconds for name, seconds in (source.run.get('phases') or {}).items() if seconds > 0}
    if not phases:
        return ''
    total = max(source.run.get('seconds', 0.0), sum(phases.values()))
    rows = [(*_PHASES.get(name, (name, 'other')), phases[name]) for name in sorted(phases, key=lambda n: -phases[n])]
    rest = total - sum(phases.values())
    if rest > 0.005 * total:
        rows.append(('everything else', 'other', rest))
    bar = ''.join(
        f'<i style="flex:{seconds / total:.4f};background:var(--{color})" title="{text(words)}"></i>'
        for words, color, seconds in rows
    )
    legend = ''.join(
        f'<li><i style="background:var(--{color})"></i>{text(words)} <span><b>{duration(seconds)}</b> '
        f'{percent(seconds / total)}</span></li>'
        for words, color, seconds in rows
    )
    return (
        f'<h3>Where the time went</h3><div class="card"><div class="stack" aria-hidden="true">{bar}</div>'
        f'<ul class="phases">{legend}</ul></div>'
    )


def samples(source: Source) -> str:
    """Prompts, muted, each with its completion; of the newest step where there are several, beside the first one's."""
    rows = source.samples
    if not rows:
        return ''
    steps = [row.get('step') or 0 for row in rows]
    newest, oldest = max(steps), min(steps)
    before = [row for row, step in zip(rows, steps, strict=True) if step == oldest < newest]
    rows = [row for row, step in zip(rows, steps, strict=True) if step == newest]
    if len(before) == len(rows):
        rows = [{**row, 'before': first.get('completion')} for row, first in zip(rows, before, strict=True)]
    made = [_sample(row) for row in rows[:_MOST_SAMPLES]]
    first, more = made[:_SHOWN_SAMPLES], made[_SHOWN_SAMPLES:]
    folded = ''
    if more:
        left = f'; {len(rows) - len(made):,} further ones are in samples.jsonl' if len(rows) > len(made) else ''
        folded = (
            f'<details><summary>{len(more)} more{left}</summary><div class="samples">{"".join(more)}</div></details>'
        )
    title = 'Before training and after' if any('before' in row for row in rows) else 'Samples, each after its prompt'
    return f'<h3>{title}</h3><div class="samples">{"".join(first)}</div>{folded}'


def example(source: Source) -> str:
    """The first example as the model saw it, what it learnt to write standing out."""
    pieces = source.run.get('example') or ()
    if not pieces:
        return ''
    tags = ((text(piece), 'mark' if trained else 'span') for piece, trained in pieces)
    shown = ''.join(f'<{tag}>{words}</{tag}>' for words, tag in tags)
    return (
        '<h3>The first example, what is learnt in colour</h3><div class="samples"><article class="sample">'
        f'<pre>{shown}</pre></article></div>'
    )


def _sample(row: Mapping[str, Any]) -> str:
    prompt, completion = _plain(row.get('prompt')), _plain(row.get('completion'))
    cut = ''
    if len(completion) > _MOST_CHARS:
        cut = f'<span> … {len(completion) - _MOST_CHARS:,} more characters</span>'
        completion = completion[:_MOST_CHARS]
    if len(prompt) > _MOST_CHARS:
        prompt = '… ' + prompt[-_MOST_CHARS:]
    score = row.get('score')
    head = f'<p>score {number(score)}</p>' if isinstance(score, int | float) and math.isfinite(score) else ''
    if 'adapter' in row:
        head = f'<p>{text(row["adapter"])}</p>{head}'
    # A line break right after <pre> would not be shown.
    body = f'<pre><span>{text(prompt)}</span>{text(completion)}{cut}</pre>'
    if 'before' in row:
        answers = [('before', row['before']), ('after', completion), ('expected', row.get('reference'))]
        body = f'<pre><span>{text(prompt)}</span></pre>' + ''.join(
            f'<p>{name}</p><pre>{text(_plain(answer)[:_MOST_CHARS])}</pre>'
            for name, answer in answers
            if answer is not None
        )
    return f'<article class="sample">{head}{body}</article>'


def _plain(value: Any) -> str:
    """A prompt as text: as it is, or a conversation turn by turn."""
    if isinstance(value, list):
        turns = (f'{turn.get("role", "")}: {turn.get("content", "")}' for turn in value if isinstance(turn, dict))
        return '\n'.join(turns) + '\n'
    return '' if value is None else str(value)


def results(source: Source) -> str:
    """Every final metric; open for the tasks that are about them."""
    rows = ''.join(
        f'<tr><td><code>{text(name)}</code></td><td class="number">{_value(name, value)}</td></tr>'
        for name, value in source.metrics.items()
    )
    if not rows:
        return ''
    opened = ' open' if source.task in ('evaluate', 'compile', 'export') else ''
    return f'<details{opened}><summary>All results</summary><div class="card"><table>{rows}</table></div></details>'


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text('not finite' if value is None else value)
    if name.endswith('bytes'):
        return f'{size(value)}'
    return f'{value:,}' if isinstance(value, int) else f'{value:,.6g}'


def recipe(source: Source) -> str:
    """What differs from the defaults, then every key."""
    if not source.config:
        return ''
    rows = source.recipe()
    differs = [row for row in rows if row[1] != row[2]]
    folded = f'<details><summary>All {len(rows)} keys</summary><div class="card">{_keys(rows)}</div></details>'
    head = '<h3>Recipe: what differs from the defaults</h3>'
    return (
        f'{head}<div class="card">{_keys(differs)}</div>{folded}'
        if differs
        else f'<h3>Recipe: the defaults</h3>{folded}'
    )


def _keys(rows) -> str:
    cells = ''.join(
        f'<tr><td><code>{text(key)}</code></td><td><code>{text(repr(value))}</code></td>'
        f'<td class="mute"><code>{"" if default is None else text(repr(default))}</code></td></tr>'
        for key, value, default in rows
    )
    return f'<table><tr><th>key</th><th>here</th><th>default</th></tr>{cells}</table>'


def machine(source: Source) -> str:
    """Hardware, versions and what the run held in memory."""
    run, found = source.run, source.run.get('hardware') or {}
    model, memory, data = (run.get(name) or {} for name in ('model', 'memory', 'data'))
    rows: list[tuple[str, Any]] = []
    if found:
        rows += [
            ('Devices', f'{found.get("devices")} x {found.get("device_kind")}'),
            ('Processor', f'{found.get("cpu")}, {found.get("cores")} cores'),
            ('Memory', size(found.get('memory_bytes') or 0)),
            ('System', found.get('system')),
        ]
    mesh = {name: length for name, length in (run.get('mesh') or {}).items() if length > 1}
    rows.append(('Mesh', ' x '.join(f'{name} {length}' for name, length in mesh.items()) or 'one device'))
    if run.get('peak_flops'):
        how = 'measured, float32' if found.get('platform') == 'cpu' else 'published, bfloat16'
        rows.append(('Peak FLOPs', f'{run["peak_flops"] / 1e12:,.3g} TFLOPs a second ({how})'))
    rows.append(('Attention', ', '.join(run.get('attention') or ())))
    if model:
        rows.append(('Parameters', f'{model["parameters"]:,}, {model["trainable"]:,} trained'))
        rows.append(('Weights', f'{size(model["weight_bytes"])}, optimizer {size(model["optimizer_bytes"])}'))
    if memory:
        rows.append(('Temporaries', f'{size(memory["temp_bytes"])} a device, by the compiler'))
    if data:
        rows.append(
            ('Training data', ', '.join(f'{amount(count)} {name.replace("_", " ")}' for name, count in data.items()))
        )
    for name, version in (run.get('versions') or {}).items():
        rows.append((name.capitalize() if name in ('python', 'commit') else name, version))
    if run.get('started'):
        rows.append(('Started', run['started'].replace('T', ' ').replace('+00:00', ' UTC')))
        rows.append(('Ended', run['ended'].replace('T', ' ').replace('+00:00', ' UTC')))
    rows = [(name, value) for name, value in rows if value not in (None, '')]
    if not run:
        return ''
    cells = ''.join(f'<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in rows)
    return f'<h3>Machine and versions</h3><div class="card"><dl class="facts">{cells}</dl></div>'


def reproduce(source: Source) -> str:
    """The command."""
    run = source.run
    if not run.get('command'):
        return ''
    versions = run.get('versions') or {}
    lines = [f'git checkout {versions["commit"].rstrip("+")}'] if versions.get('commit') else []
    lines.append(run['command'])
    changed = ' Files of the checkout differed from that commit.' if versions.get('commit', '').endswith('+') else ''
    return (
        '<h3>How to reproduce</h3><div class="card"><div class="command"><button class="copy" hidden>copy</button>'
        f'<pre>{text(chr(10).join(lines))}</pre></div><p class="hint">In this workdir the same command continues where '
        f'the run stopped; with another <code>--workdir</code> it starts anew.{changed}</p></div>'
    )
