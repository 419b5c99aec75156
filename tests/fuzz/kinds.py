"""Cases of what is no folder of a model: recipes, their files, data, workdirs, documents, templates, rewards."""

import functools
import gzip
import io
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable

import hostile
import mutate
from case import Case
from made import TASKS, Made, Source, recipe_text, records

Rng, Path = random.Random, pathlib.Path

# Keys that make a job long, or a model large, not wrong.
_LONG = (
    'train.steps', 'train.epochs', 'train.batch_size', 'train.accumulate', 'rl.', 'generate.', 'eval.', 'data.seq_len',
    'data.target_len', 'python-stdlib', 'data.vocab_size', 'data.steps.', 'model.config', 'method.',
)  # fmt: skip
_INNER = {
    'model.config': (
        'vocab_size', 'hidden_size', 'num_attention_heads', 'model_type', 'rope_scaling', 'hidden_act',
        'num_hidden_layers', 'rope_theta', 'intermediate_size',
    ),
    'data.sources': ('web', 'a.path', 'a.kind', 'a.weight', 'a', '../x', 'a b'),
    'data.template_args': ('enable_thinking', 'tools', 'documents', 'messages', 'date_string', 'a b'),
}  # fmt: skip
_NAMES = ('a', 'b', 'a.b', 'name', '__class__')


@functools.cache
def _passing(key: str) -> tuple[Source, ...]:
    """The odd values that a key's own check lets pass: what is wrong with them must be found later."""
    import ml_collections

    from jaxtune.common.checks import ExpectedError
    from jaxtune.config import SCHEMA

    check, found = getattr(SCHEMA.get(key), 'check', None), []
    for value in mutate.VALUES if check else ():
        try:
            check(eval(value, {'ConfigDict': ml_collections.ConfigDict}))
        except ExpectedError:
            continue
        except Exception:  # a finding, which the case itself will show
            pass
        found.append(value)
    return tuple(found)


def recipe(made: Made, rng: Rng, folder: Path) -> Case:
    """One to three keys of a good recipe get an odd value, in the file or on the command line."""
    from jaxtune.config import SCHEMA, OpenSubtree

    name = rng.choice(TASKS)
    keys, flags, said = made.task(name), [], []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(list(SCHEMA))
        if isinstance(SCHEMA[key], OpenSubtree) and rng.random() < 0.8:
            key = f'{key}.{rng.choice(_INNER.get(key, _NAMES))}'
        elif rng.random() < 0.06:
            key = rng.choice((key + 'x', key.split('.')[0], 'x.' + key, key + '.x', '__class__', 'stages'))
        if rng.random() < 0.3:
            word = rng.choice(mutate.WORDS)
            flags.append(f'--config.{key}={word}')
            said.append(f'{key}={word[:30]!r} (flag)')
        else:
            passing = _passing(key) if rng.random() < 0.75 else ()
            keys[key] = value = rng.choice(passing or mutate.VALUES)
            said.append(f'{key}={value[:40]}')
    for key in [key for key in keys if any(other.startswith(key + '.') for other in keys)]:
        keys[key] = keys.pop(key)  # a group's own name with a value: laid last
    what = f'{name}: {", ".join(said)}'
    return Case('recipe', what, keys, flags, long=any(mark in what for mark in _LONG))


_LINES = ('raise SystemExit(0)', 'import sys; sys.exit()', '1 / 0', 'raise BaseException', 'import not_there', 'x = [')


def source(made: Made, rng: Rng, folder: Path) -> Case:
    """The recipe's file itself is damaged."""
    text = recipe_text(made.task(rng.choice(('train', 'prepare'))))
    if rng.random() < 0.4:
        lines, line = text.split('\n'), rng.choice(_LINES)
        place = rng.choice((0, 4))
        lines.insert(place, f'    {line}' if place else line)
        data, said = '\n'.join(lines).encode(), line
    else:
        data, said = mutate.raw(rng, text.encode())
    (folder / 'recipe.py').write_bytes(data)
    return Case('source', said)


def _kind_of_record(name: str, rng: Rng) -> str:
    kinds = {
        'sft': ('messages', 'sharegpt', 'alpaca', 'prompt'), 'reward': ('preference',), 'dpo': ('preference',),
        'seq2seq': ('pair',), 'classification': ('class',), 'ppo': ('prompt', 'messages'),
        'generate': ('prompt', 'messages', 'alpaca'),
    }  # fmt: skip
    return rng.choice(kinds.get(name, ('text',)))


_DATA_TASKS = (
    'train', 'sft', 'reward', 'dpo', 'masked_lm', 'span', 'seq2seq', 'classification', 'ppo', 'evaluate', 'generate',
    'prepare',
)  # fmt: skip
_FORMS = (
    'jsonl', 'jsonl', 'jsonl', 'json', 'txt', 'parquet', 'jsonl.gz', 'csv', 'folder', 'jsonl.zst', 'jsonlines', 'tsv',
)  # fmt: skip


def data(made: Made, rng: Rng, folder: Path) -> Case:
    """The data of a good recipe is damaged."""
    name = rng.choice(_DATA_TASKS)
    keys, kind = made.task(name), _kind_of_record(name, rng)
    key = 'data.eval' if name in ('evaluate', 'generate') else 'data.train'
    rows, form, said = records(kind, 8), rng.choice(_FORMS), []
    if name in ('sft', 'ppo', 'generate', 'reward', 'dpo'):
        keys['data.format'] = rng.choice(('auto', kind))
    file = folder / f'data set é.{"d" if form == "folder" else form}'
    if by_value := rng.random() < 0.75:
        for _ in range(rng.choice((1, 1, 3))):
            number = rng.randrange(len(rows))
            rows[number], done = mutate.json_value(rng, rows[number], rng.choice((1, 1, 2)))
            said.append(f'record {number + 1}: {done}')
    payload = _payload(form, rows)
    if not by_value:
        payload, done = mutate.raw(rng, payload)
        said.append(done)
    if form == 'folder':
        said.append(_write_folder(file, payload, rng))
    else:
        file.write_bytes(payload)
    keys[key] = str(file)
    culprits = (file.name, key, *(('data.',) if by_value else ()))
    return Case('data', f'{name} {form}: {"; ".join(said)}', keys, [], culprits)


def _payload(form: str, rows: list) -> bytes:
    lines = ''.join(mutate.dumps(row) + '\n' for row in rows).encode()
    if form == 'json':
        return mutate.dumps(rows).encode()
    if form == 'txt':
        return '\n'.join(map(str, rows)).encode('utf-8', 'surrogatepass')
    if form in ('csv', 'tsv'):
        return b'text,label\n"a ""b",1\nx\n'.replace(b',', b'\t' if form == 'tsv' else b',')
    if form == 'jsonl.gz':
        return gzip.compress(lines)
    if form == 'jsonl.zst':
        import pyarrow

        return pyarrow.compress(lines, codec='zstd', asbytes=True)
    return (_parquet(rows) or lines) if form == 'parquet' else lines


def _parquet(rows: list) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)]), sink)
    except Exception:  # a value that no column can hold
        return b''
    return sink.getvalue()


def _write_folder(folder: Path, payload: bytes, rng: Rng) -> str:
    folder.mkdir()
    (folder / 'a.jsonl').write_bytes(payload)
    odd = rng.choice(('loop', 'dangling', 'folder.jsonl', 'pipe', 'binary', 'hidden', 'empty', 'unreadable'))
    if odd == 'loop':
        (folder / 'again').symlink_to(folder)
        (folder / 'self.jsonl').symlink_to(folder / 'self.jsonl')
    elif odd == 'dangling':
        (folder / 'gone.jsonl').symlink_to('/not/there')
    elif odd == 'folder.jsonl':
        (folder / 'b.jsonl').mkdir()
    elif odd == 'pipe':
        os.mkfifo(folder / 'b.jsonl')
    elif odd == 'binary':
        (folder / 'model.bin').write_bytes(bytes(range(64)))
    else:
        (folder / ('.hidden.jsonl' if odd == 'hidden' else 'empty.jsonl')).write_bytes(b'')
    return odd


def workdir(made: Made, rng: Rng, folder: Path) -> Case:
    """A workdir that holds a run is damaged, and the same command goes on in it."""
    name = rng.choice(('kept', 'kept', 'prepared'))
    run, said = folder / 'run', []
    shutil.copytree(made.run(name), run, symlinks=True)
    shutil.copy(made.folder / name / 'recipe.py', folder)
    if rng.random() < 0.5:
        (run / 'result.json').unlink()
        said.append('no result')
    said += [_damage(rng, run) for _ in range(rng.choice((1, 1, 2)))]
    flags = ['--config.train.steps=3'] if name == 'kept' else []
    return Case('workdir', f'{name}: {"; ".join(said)}', {}, flags, ('run/', '--workdir', 'run:'), full=True)


def _damage(rng: Rng, run: Path) -> str:
    files = [file for file in sorted(run.rglob('*')) if file.is_file() and 'events.out' not in file.name]
    tops = [file for file in sorted(run.glob('*.json*')) if file.is_file()]
    steps = sorted((run / 'checkpoints').glob('[0-9]'))
    how = rng.choice(('json', 'json', 'raw', 'raw', 'gone', 'empty step', 'half step', 'odd step', 'folder'))
    how = 'raw' if 'step' in how and not steps else how
    if how in ('json', 'folder') and tops:
        file = rng.choice(tops)
        if how == 'folder':
            file.unlink()
            file.mkdir()
        elif file.suffix == '.json':
            try:
                held = json.loads(file.read_text() or '{}')
            except RecursionError:  # an earlier change made it so deep
                held = {}
            value, how = mutate.json_value(rng, held, rng.choice((1, 3)))
            file.write_text(mutate.dumps(value))
        return f'{file.name}: {how}'
    if how == 'empty step':
        shutil.rmtree(steps[-1])
        steps[-1].mkdir()
    elif how == 'half step':
        for file in sorted(file for file in steps[-1].rglob('*') if file.is_file())[::2]:
            file.unlink()
    elif how == 'odd step':
        how = rng.choice(('99', 'x', '-1', '3.orbax-checkpoint-tmp-1', '007', '.hidden'))
        (run / 'checkpoints' / how).mkdir(exist_ok=True)
    else:
        file = rng.choice(files)
        content, done = mutate.raw(rng, file.read_bytes())
        file.unlink()
        if how != 'gone':
            file.write_bytes(content)
        return f'{file.relative_to(run)} {done if how != "gone" else how}'
    return how


def _documents(kind: str, make: Callable, made: Made, rng: Rng, folder: Path) -> Case:
    place, said = folder / 'raw é', []
    place.mkdir()
    rows = [{'text': ' '.join(row['text'] for row in records('text', 20, seed))} for seed in range(8)]
    (place / 'good.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for number in range(rng.choice((2, 5, 9))):
        name, content = make(rng)
        said.append(name)
        if rng.random() < 0.5:
            content, done = mutate.raw(rng, content)
            said[-1] += f' {done}'
        (place / f'{number}-{name}').write_bytes(content)
    of_source = rng.choice(('auto', 'auto', 'web', 'books', 'code', 'text', 'wikipedia'))
    keys = made.task('phases') | {'data.sources': {'a': {'path': str(place), 'kind': of_source}}}
    for step in ('clean.encoding', 'clean.unicode', 'clean.markup', 'clean.pii'):
        keys[f'data.steps.{step}'] = rng.random() < 0.7
    keys['data.steps.filter.preset'] = rng.choice((*['none'] * 5, 'auto', 'books', 'code', 'zh', 'web'))
    keys['data.steps.dedup.paragraphs'] = rng.choice((0, 1))
    keys['data.steps.dedup.substring'] = rng.choice((0, 10))
    return Case(kind, f'{of_source}: {", ".join(said)}', keys, [], ('data.',), full=True)


def documents(made: Made, rng: Rng, folder: Path) -> Case:
    """Raw documents, many damaged, go through the phases of preparing: what is broken is set aside."""
    return _documents('documents', hostile.document, made, rng, folder)


def xml(made: Made, rng: Rng, folder: Path) -> Case:
    """The same with pages, books and dumps of XML alone."""
    return _documents('xml', hostile.xml, made, rng, folder)


def template(made: Made, rng: Rng, folder: Path) -> Case:
    """A chat template of the recipe is hostile or broken."""
    name = rng.choice(('sft', 'dpo', 'generate', 'ppo'))
    keys, text = made.task(name), rng.choice(hostile.TEMPLATES)
    keys['data.template'] = text
    if name in ('generate', 'ppo'):
        key = 'data.eval' if name == 'generate' else 'data.train'
        keys |= {key: str(made.data / 'messages.jsonl'), 'data.format': 'messages'}
    return Case('template', f'{name}: {text[:90]!r}', keys, [], ('template', 'data.'))


def reward(made: Made, rng: Rng, folder: Path) -> Case:
    """A person's reward function, or its module, is hostile or broken."""
    text = rng.choice(hostile.REWARDS)
    body = text[1:] if text.startswith('\n') else f'def reward(prompts, completions, **rest):\n    {text}\n'
    (folder / 'mine.py').write_text(body, 'utf-8')
    name = rng.choice(('mine:reward', 'mine.py:reward', str(folder / 'mine.py') + ':reward'))
    keys = made.task(rng.choice(('grpo', 'ppo'))) | {'rl.reward': name}
    # Only a run calls it.
    full = not text.startswith('\n') and rng.random() < 0.5
    return Case('reward', f'{name}: {text[:80]!r}', keys, [], ('rl.reward', 'mine'), full=full)
