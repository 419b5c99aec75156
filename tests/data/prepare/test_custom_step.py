"""A step of the user's own, in a package outside the repository: named in a recipe, run, counted, resumed."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxtune.data.prepare import sources
from jaxtune.errors import UserError

from .conftest import contents
from .corpus import prose

ROOT = pathlib.Path(__file__).resolve().parents[3]
STEP = """
import os, time
from jaxtune.data.prepare import Dropped, Step

def no_shouting(document, settings):
    while os.path.exists({wait!r}) and 'wait here' in document.text:
        time.sleep(0.02)
    if document.text.isupper():
        return Dropped('all capitals')
    return document.text.replace('aloud', 'quietly')

NO_SHOUTING = Step(
    'no shouting',
    'capitals, and what is said aloud',
    no_shouting,
    applies=lambda document, settings: document.kind == 'books' and settings.min_chars > 1,
)
"""
RECIPE = """
from ml_collections import ConfigDict
from jaxtune.data.prepare import sources

sources._TASK, sources._CUT = 20_000, 20_000

def get_config():
    return ConfigDict({{
        'task': 'prepare',
        'data': {{
            'sources': {{'prose': {{'path': {path!r}, 'kind': 'books'}}}},
            'custom_steps': ('steps_outside.shouting:NO_SHOUTING',),
            'steps': {{'clean': {{'unicode': True}}, 'dedup': {{'near': 0.8}}}},
            'vocab_size': 400, 'min_chars': 20, 'workers': 2,
        }},
    }})
"""


@pytest.fixture
def outside(tmp_path):
    """A folder with a package, a recipe that names its step, and a corpus of many tasks."""
    wait = tmp_path / 'wait'
    (tmp_path / 'steps_outside').mkdir()
    (tmp_path / 'steps_outside' / '__init__.py').write_text('')
    (tmp_path / 'steps_outside' / 'shouting.py').write_text(STEP.format(wait=str(wait)))
    (tmp_path / 'recipe.py').write_text(RECIPE.format(path=str(tmp_path / 'corpus.jsonl')))
    texts = [prose(200, i) for i in range(24)]
    texts[5] = texts[5].upper()
    texts[9] += ' This was said aloud.'
    texts[20] += ' Please wait here.'
    (tmp_path / 'corpus.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return tmp_path


def command(folder, name, *words):
    return [
        [sys.executable, '-m', 'jaxtune.main', '--config', 'recipe.py', '--workdir', str(folder / name), *words],
        {'cwd': folder, 'env': {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}},
    ]


def run(words, how):
    done = subprocess.run(words, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_run_counted_reported_and_continued(outside):
    words, how = command(outside, 'whole')
    run(words, how)
    stats = json.loads((outside / 'whole' / 'stats.json').read_text())
    assert list(stats['steps']) == [
        'clean', 'length', 'language', 'no shouting', 'exact duplicates', 'near-duplicates'
    ]  # fmt: skip
    counts = stats['steps']['no shouting']
    assert (counts['documents_in'], counts['documents_out'], counts['changed']) == (24, 23, 1)
    assert [(why, entry['documents']) for why, entry in counts['dropped'].items()] == [('all capitals', 1)]
    result = json.loads((outside / 'whole' / 'result.json').read_text())
    assert result['metrics']['data/dropped_no_shouting'] == 1
    page = (outside / 'whole' / 'report.html').read_text()
    assert '<b>no shouting</b><small>capitals, and what is said aloud</small>' in page
    assert 'all capitals <small>no shouting</small>' in page
    manifest = json.loads((outside / 'whole' / 'manifest.json').read_text())
    assert manifest['custom_steps'] == ['steps_outside.shouting:NO_SHOUTING']

    # Killed while the step is at work in a later task, and continued with the same command.
    (outside / 'wait').touch()
    words, how = command(outside, 'cut')
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, **how)
    done, begun = outside / 'cut' / 'work' / 'logs' / 'collect' / 'completions', time.monotonic()
    while not (done.is_dir() and any(done.iterdir())):
        assert process.poll() is None
        assert time.monotonic() - begun < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (outside / 'wait').unlink()
    assert not (outside / 'cut' / 'result.json').exists()
    assert 0 < len(list(done.iterdir())) < len(list((done.parents[2] / 'tasks').iterdir()))
    run(words, how)
    assert contents(outside / 'cut') == contents(outside / 'whole')


@pytest.mark.exhaustive
def test_on_slurm(outside):
    """The jobs that are submitted run the step, in another folder than the one that they are submitted from."""
    lines = (outside / 'corpus.jsonl').read_text().splitlines(keepends=True)
    (outside / 'corpus.jsonl').write_text(''.join(lines[:12]))
    queue = outside / 'queue'
    (queue / 'bin').mkdir(parents=True)
    (queue / 'bin' / 'sbatch').write_text(
        f'#!/bin/bash\nn=$(ls {queue} | wc -l)\ncp "${{@: -1}}" {queue}/$n.sh\necho "Submitted batch job $n"\n'
    )
    (queue / 'bin' / 'srun').write_text('#!/bin/bash\nshift 3\nexec "$@"\n')
    (queue / 'bin' / 'scontrol').write_text('#!/bin/bash\necho a\n')
    for program in (queue / 'bin').iterdir():
        program.chmod(0o755)
    changes = ['--config.data.engine=slurm', '--config.data.slurm.partition=cpu', '--config.data.steps.dedup.near=0.0']
    words, how = command(outside, 'slurm', *changes)
    how['env'] = {**how['env'], 'PATH': f'{queue / "bin"}:{os.environ["PATH"]}'}
    run(words, how)
    jobs = sorted(queue.glob('*.sh'), key=lambda path: int(path.stem))
    arrays = [job for job in jobs if 'launch_pickled_pipeline' in job.read_text()]
    assert len(arrays) == 5
    elsewhere, slurm = {**how, 'cwd': queue}, {'SLURM_NODELIST': 'a', 'RUN_OFFSET': '0'}
    for job in arrays:
        for task in range(int(re.search(r'--array=0-(\d+)', job.read_text())[1]) + 1):
            elsewhere['env'] = {**how['env'], **slurm, 'SLURM_ARRAY_TASK_ID': str(task)}
            run(['bash', str(job)], elsewhere)
    run(words, how)
    words, how = command(outside, 'local', '--config.data.steps.dedup.near=0.0')
    run(words, how)
    assert contents(outside / 'slurm') == contents(outside / 'local')


def test_a_file_with_a_step(prepared, tmp_path, monkeypatch):
    """Named relative to the current folder, and found by the workers too."""
    monkeypatch.setattr(sources, '_TASK', 5_000)
    monkeypatch.setattr(sources, '_CUT', 5_000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text(STEP.format(wait='') + "NO_SHOUTING = Step('mine', '', no_shouting)\n")
    rows = [{'text': text} for text in [*(prose(100, i) for i in range(20)), 'ALL OF THIS']]
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for name, workers in (('one', 1), ('two', 2)):
        changes = {'data.train': 'in.jsonl', 'data.custom_steps': 'own.py:NO_SHOUTING', 'data.workers': workers}
        assert prepared(name, changes)['metrics']['data/dropped_mine'] == 1
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


@pytest.mark.parametrize(
    ('source', 'name', 'words'),
    [
        ("S = Step('clean', '', keep)", 'own.py:S', "a step named 'clean' is there already"),
        ("S = Step('a', '', keep)", 'clean', "'clean': expected module:NAME or file.py:NAME of a Step"),
        ("S = Step('a', '')", 'own.py:S', r'own\.py:S: expected a step with process'),
        ("S = Step('', '', keep)", 'own.py:S', "name='': expected a text"),
        ('S = keep', 'own.py:S', 'expected a jaxtune Step, found function'),
        ("S = Step('a', '', keep)", 'own.py:T', "own.py has no 'T'"),
        ("S = Step('a', '', keep, on=lambda settings: settings.nothing)", 'own.py:S', 'own.py:3: .*AttributeError'),
        ("S = Step('a', '', lambda document, settings: None)", 'own.py:S', r'process returned None; expected the text'),
        ("S = Step('a', '', lambda document, settings: 1 / 0)", 'own.py:S', r'own.py:3: .*S: ZeroDivisionError'),
    ],
)
def test_a_step_that_is_none(prepared, tmp_path, monkeypatch, source, name, words):
    monkeypatch.chdir(tmp_path)
    keep = 'def keep(document, settings): return document.text'
    (tmp_path / 'own.py').write_text(f'from jaxtune.data.prepare import Step\n{keep}\n{source}\n')
    (tmp_path / 'in.txt').write_text('a few words')
    with pytest.raises(UserError, match=r'data\.custom_steps=') as caught:
        prepared('a', {'data.train': 'in.txt', 'data.custom_steps': (name,)})
    assert re.search(words, str(caught.value))
