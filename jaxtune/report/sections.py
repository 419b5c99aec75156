"""The parts of a report: functions from a run's files to the values of a template, empty if there are none."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.common.formatting import amount, duration, short_time, size
from jaxtune.common.sources import AUTO
from jaxtune.metrics import names
from jaxtune.report import mixture
from jaxtune.report.charts import Figure, Series, chart, smooth
from jaxtune.report.source import Source
from jaxtune.report.stack import Slice, cut, percent

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
    'samples': ('writing samples', 'eval-phase'),
    'lost': ('updates done again after a kill', 'other'),
    'down': ('between an end and the next start', 'other'),
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

# Charts of these come first, in this order; then the others by name.
FIRST = ('reward', 'accuracy', 'kl', 'approx_kl', 'entropy', 'length', 'eos_rate', 'ended')
FIRST += ('clip_fraction', 'clip_low_fraction', 'clip_high_fraction', 'occupancy')
FIRST += ('learning_rate', 'grad_norm', 'tokens_per_second', 'mfu', 'peak_bytes')
# Shown by another chart, or constant.
NO_CHART = ('step_seconds', 'perplexity', 'bits_per_byte', 'gzip_bits_per_byte', 'tokens', 'pairs', 'answers')


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


_SHOW: dict[str, Callable[[float], str]] = {'bytes': size, 'percent': percent, '': number}
_SHOW_AXIS: dict[str, Callable[[float], str]] = {
    'bytes': size,
    'percent': lambda share: f'{100 * share:.3g} %',
    '': axis,
}


def lead(source: Source) -> str:
    """One sentence that describes the run, plain text."""
    key, model, steps = source.key, source.run.get('model') or {}, source.result.get('step')
    if source.task == 'prepare':
        sources = _named(key('data.train')) if key('data.train') else ', '.join(source.stats.get('sources') or ())
        collected, kept = source.metric('data/collected_documents'), source.metric('data/documents')
        of = f': {kept:,} of {collected:,} documents stay' if collected and kept is not None else ''
        return f'Text from {sources or "its sources"}, made ready for training{of}.'
    if source.task == 'generate':
        return f'Completions by {_short(key("model.path"))} of prompts from {_named(key("data.eval"))}.'
    if source.task == 'evaluate':
        return f'{_short(key("model.path"))} scored on {_held_out_data(source)}.'
    if source.task != 'train' and not source.rewarded:
        return ''
    kind = key('model.config.model_type') or model.get('family') or 'model'
    words = [f'{"An" if kind[0] in "aeio" else "A"} {kind}']
    if model.get('parameters'):
        words.append(f'of {amount(model["parameters"])} parameters')
        if model.get('layers') and model.get('d_model'):
            words.append(f'({model["layers"]} layers, width {model["d_model"]:,})')
    path = key('model.path')
    words.append(f'trained from {"the weights of " + _short(path) if path else "scratch"}')
    words.append(f'on {_named(key("data.train", "its data"))}')
    if source.rewarded:
        words.append(f'by {source.algorithm.upper()} for {steps or 0:,} steps of {key("rl.rollouts", "some")} answers,')
        judges = [_short(key(name)) for name in ('rl.reward', 'rl.environment') if key(name, '')]
        words.append(f'each scored by {" and ".join(judges)},')
    elif steps:
        words.append(f'for {steps:,} updates')
        if tokens := source.run.get('tokens_per_step'):
            words.append(f'of {tokens:,} tokens ({amount(steps * tokens)} in all)')
    machine = source.run.get('hardware') or {}
    if machine:
        words.append(f'on {device_words(machine)}')
    return ' '.join(words) + '.'


def _named(data: Any) -> str:
    """Data in words: the end of a path, or the labels of its sources."""
    if not isinstance(data, Mapping):
        return _short(data)
    *others, last = data
    return f'{", ".join(others)} and {last}' if others else last


def _held_out_data(source: Source) -> str:
    held_out = source.key('data.eval')
    return f'a held-out share of {_named(source.key("data.train"))}' if held_out == AUTO else _named(held_out)


def _short(path: Any) -> str:
    """The end of a long path; the name of a stage."""
    parts = str(path).removeprefix('@').rstrip('/').split('/')
    return '/'.join(parts[-2:]) if len(parts) > 3 else '/'.join(parts)


def device_words(machine: Mapping[str, Any]) -> str:
    """The hardware of a run in words."""
    if machine.get('platform') == 'cpu':
        virtual = f' as {machine["devices"]} devices' if machine.get('devices', 1) > 1 else ''
        return f'{machine.get("cores")} CPU cores{virtual}'
    return f'{machine.get("devices")} x {machine.get("device_kind")}'


@dataclasses.dataclass(frozen=True)
class Tile:
    """A headline number.

    Attributes:
      name: what it is.
      value: words; those that begin with a letter are units, and are shown small.
      note: below it.
      bars: two widths in percent, to compare it with another number.
    """

    name: str
    value: str
    note: str = ''
    bars: tuple[float, ...] = ()


def tiles(source: Source, seconds: float | None = None) -> list[Tile]:
    """The headline numbers; `seconds` stands for the time of several runs together."""
    metric = source.metric
    shown = []
    if source.rewarded:
        shown += _reward_tiles(source)
    elif (loss := metric('eval/loss')) is not None:
        shown.append(Tile('Held-out loss', f'{loss:.3f} nats', _best_note(source, loss)))
    elif (loss := metric('train/loss')) is not None:
        shown.append(Tile('Training loss', f'{loss:.3f} nats', 'the last one logged'))
    if (perplexity := metric('eval/perplexity')) is not None:
        shown.append(Tile('Perplexity', number(perplexity), 'e to the loss'))
    if (bits := metric('eval/bits_per_byte')) is not None:
        shown.append(Tile('Bits per byte', f'{bits:.3f}', *_against_gzip(bits, source.gzip)))
    if (accuracy := metric('eval/accuracy')) is not None:
        longer = metric('eval/longer_is_better')
        note = '' if longer is None else f'always the longer answer: {percent(longer)}'
        shown.append(Tile(names.title('accuracy', source.titles), percent(accuracy), note))
    if source.task == 'prepare':
        shown += _preparation_tiles(source)
    if source.task == 'generate' and source.samples:
        shown.append(Tile('Completions', f'{len(source.samples):,}'))
    if source.compiled:
        shown += _compiled_tiles(source)
    elif (speed := source.tokens_per_second) is not None:
        mfu = source.curves.get('train/mfu')
        middle = sorted(value for _, value in mfu)[len(mfu) // 2] if mfu else None
        note = f'{percent(middle)} of peak FLOPs' if middle is not None else 'median'
        shown.append(Tile('Tokens a second', f'{speed:,.0f}', note))
    if (goodput := metric('time/goodput')) is not None:
        shown.append(Tile('Goodput', percent(goodput), 'of the time in updates that count'))
    if seconds is not None:
        shown.append(Tile('Time', duration(seconds), 'all stages'))
    elif 'seconds' in source.run:
        runs = source.run.get('runs', 1)
        note = f'over {runs} runs' if runs > 1 else 'from start to report'
        shown.append(Tile('Time', duration(source.run['seconds']), note))
    return shown


def _compiled_tiles(source: Source) -> list[Tile]:
    needed, limit = source.metric('peak_bytes_per_device'), source.compiled.get('available_bytes')
    shown = []
    if cells := source.compiled.get('cells'):
        shown.append(Tile('Fit', f'{sum(cell["fits"] for cell in cells)} of {len(cells)}', 'as they are'))
    if needed is not None and limit:
        verdict = 'fits' if source.metrics.get('fits') else 'does not fit'
        shown.append(Tile('Peak memory of a device', size(needed), f'of {size(limit)}: {verdict}'))
    if (seconds := source.metric('estimated_seconds')) is not None:
        shown.append(Tile('An update', short_time(seconds), 'by the estimate'))
    if (speed := source.metric('estimated_tokens_per_second')) is not None:
        mfu = source.metric('estimated_mfu')
        note = '' if mfu is None else f', {percent(mfu)} of the peak'
        shown.append(Tile('Tokens a second', f'{speed:,.0f}', f'by the estimate{note}'))
    return shown


def _preparation_tiles(source: Source) -> list[Tile]:
    counts = {'documents': 'Documents', 'train_tokens': 'Training tokens', 'eval_tokens': 'Held-out tokens'}
    shown = [Tile(words, amount(value)) for name, words in counts.items() if (value := source.metric(f'data/{name}'))]
    if (ratio := source.metric('data/bytes_per_token')) is not None:
        shown.append(Tile('Bytes a token', f'{ratio:.2f}', 'of UTF-8'))
    if source.gzip is not None:
        shown.append(Tile('gzip -9', f'{source.gzip:.3f}', 'bits per held-out byte'))
    return shown


def _reward_tiles(source: Source) -> list[Tile]:
    """The reward on held-out prompts, else in training, and the KL from the reference."""
    shown = []
    for name, words in (('eval/reward', 'Held-out reward'), (f'{source.algorithm}/reward', 'Reward in training')):
        curve = source.curves.get(name)
        if curve and not shown:
            shown.append(Tile(words, number(curve[-1][1]), f'{number(curve[0][1])} at step {curve[0][0]:,.0f}'))
    if (kl := source.metric(f'{source.algorithm}/kl')) is not None:
        shown.append(Tile(names.title('kl', source.titles), f'{number(kl)} nats', 'an answer, at the last step'))
    if (occupied := source.metric(f'{source.algorithm}/occupancy')) is not None:
        shown.append(Tile('Slots that wrote', percent(occupied), 'of all, while it sampled'))
    return shown


def _best_note(source: Source, loss: float) -> str:
    curve = source.curves.get('eval/loss')
    if not curve or len(curve) < 2:
        return f'a {_counted(source)}'
    step, best = min(curve, key=lambda point: point[1])
    return f'best {best:.3f} at update {step:,.0f}' if best < loss - 5e-4 else 'the best of the run'


def _counted(source: Source) -> str:
    """What a loss is a mean over."""
    return 'pair' if source.metric('eval/pairs') is not None else 'scored token'


def _against_gzip(bits: float, gzip: float | None) -> tuple[str, tuple[float, ...]]:
    """The note and the bars that compare bits a byte with those of gzip."""
    if not gzip:
        return 'of held-out text', ()
    widest = max(bits, gzip)
    change = 1 - bits / gzip
    note = f'{abs(change):.0%} {"below" if change > 0 else "above"} the {gzip:.3f} of gzip -9'.replace('%', ' %')
    return note, (100 * bits / widest, 100 * gzip / widest)


def charts(source: Source) -> list[Figure]:
    """The loss, large, and all other curves, small."""
    by_name: dict[str, list[str]] = {}
    for metric in source.curves:
        if names.source_of(metric) or names.positions_of(metric):
            continue  # drawn together
        by_name.setdefault(names.last_part(metric), []).append(metric)
    drawn = []
    if not source.rewarded:
        drawn += [_loss_chart(source), _source_chart(source)]
        by_name.pop('loss', None)
    kinds = tuple(name for name in sorted(by_name) if name.startswith('reward/'))
    last_parts = [name for name in (FIRST[0], *kinds, *FIRST[1:]) if name in by_name]
    last_parts += [name for name in sorted(by_name) if name not in last_parts and name not in NO_CHART]
    for name in last_parts:
        metrics = [metric for metric in by_name[name] if len(source.curves[metric]) > 1]
        series = [
            Series(
                metric.split('/')[0] if len(metrics) > 1 else metric,
                source.curves[metric],
                'eval' if metric.startswith('eval/') else 'train' if len(metrics) > 1 else 'plain',
                'dots' if metric.startswith('eval/') else 'line',
            )
            for metric in metrics
        ]
        large = source.rewarded and name == 'reward'
        drawn.append(metric_chart(names.title(name, source.titles), series, name, large))
    return [figure for figure in drawn if figure is not None]


def metric_chart(title: str, series: list[Series], name: str, large: bool = False) -> Figure | None:
    """Curves of one metric, `name` being the last part of its name."""
    unit = names.unit(name)
    kind = 'log' if name == 'loss' else 'zero' if unit or name in ('learning_rate', 'tokens_per_second') else ''
    return chart(title, series, _SHOW[unit], _SHOW_AXIS[unit], unit=unit, kind=kind, large=large)


def _loss_chart(source: Source) -> Figure | None:
    train, held_out = source.curves.get('train/loss', []), source.curves.get('eval/loss', [])
    if len(train) < 2 and len(held_out) < 2:
        return None
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


def _source_chart(source: Source) -> Figure | None:
    """The held-out loss of each source of a mixture."""
    title = f'Held-out loss by source, nats a {_counted(source).split()[-1]}'
    return chart(title, mixture.curves(source), number, axis, kind='log')


def time_spent(source: Source) -> list[Slice]:
    """The phases of a run, the longest first."""
    phases = {name: seconds for name, seconds in (source.run.get('phases') or {}).items() if seconds > 0}
    if not phases:
        return []
    total = max(source.run.get('seconds', 0.0) + phases.get('down', 0.0), sum(phases.values()))
    rows = [(*_PHASES.get(name, (name, 'other')), phases[name]) for name in sorted(phases, key=lambda n: -phases[n])]
    rest = total - sum(phases.values())
    if rest > 0.005 * total:
        rows.append(('everything else', 'other', rest))
    return [cut(words, color, duration(s), s / total) for words, color, s in rows]


def results(source: Source) -> list[tuple[str, str]]:
    """`(name, value)` of every final metric."""
    return [(name, _value(name, value)) for name, value in source.metrics.items()]


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str('not finite' if value is None else value)
    if name.endswith(('bytes', 'bytes_per_device')) and not names.source_of(name):
        return size(value)
    return f'{value:,}' if isinstance(value, int) else f'{value:,.6g}'


def recipe(source: Source) -> list[tuple[str, str, str, bool]]:
    """`(key, value, default, whether they differ)` of every key; no default where it has none."""
    if not source.config:
        return []
    rows = source.recipe()
    return [(key, repr(value), '' if usual is None else repr(usual), value != usual) for key, value, usual in rows]


def machine(source: Source) -> list[tuple[str, str]]:
    """`(name, value)` of hardware, versions and memory."""
    run, hardware = source.run, source.run.get('hardware') or {}
    if not run:
        return []
    model, memory, data = (run.get(name) or {} for name in ('model', 'memory', 'data'))
    rows: list[tuple[str, Any]] = []
    if hardware:
        rows += [
            ('Devices', f'{hardware.get("devices")} x {hardware.get("device_kind")}'),
            ('Processor', f'{hardware.get("cpu")}, {hardware.get("cores")} cores'),
            ('Memory', size(hardware.get('memory_bytes') or 0)),
            ('System', hardware.get('system')),
        ]
    mesh = {name: length for name, length in (run.get('mesh') or {}).items() if length > 1}
    rows.append(('Mesh', ' x '.join(f'{name} {length}' for name, length in mesh.items()) or 'one device'))
    if run.get('peak_flops'):
        how = 'measured, float32' if hardware.get('platform') == 'cpu' else 'published, bfloat16'
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
    return [(name, str(value)) for name, value in rows if value not in (None, '')]


@dataclasses.dataclass(frozen=True)
class Command:
    """How to run it again: the lines of a shell, and whether files of the checkout differed from its commit."""

    lines: str
    changed: bool


def reproduce(source: Source) -> Command | None:
    """The command."""
    run = source.run
    if not run.get('command'):
        return None
    commit = (run.get('versions') or {}).get('commit') or ''
    lines = [f'git checkout {commit.rstrip("+")}'] if commit else []
    return Command('\n'.join([*lines, run['command']]), commit.endswith('+'))
