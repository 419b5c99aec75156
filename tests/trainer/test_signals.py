"""SIGTERM and Ctrl-C at any moment: training saves first, everything else ends at once, nothing is swallowed."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from runs import SENTENCE, metrics, recipe, start, write_recipe
from test_resume import updates, wait_for


def ended(process, status):
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert 'Traceback' not in errors
    assert 'Exception ignored' not in errors
    return output, errors


def test_ctrl_c_saves_and_a_second_one_leaves(corpus, tmp_path):
    keys = recipe(corpus, train__steps=5000, checkpoint__every=0, eval__every=0)
    path, run = write_recipe(tmp_path / 'recipe.py', keys), tmp_path / 'run'
    process = start(path, run)
    wait_for(lambda: updates(run) >= 7, process)
    process.send_signal(signal.SIGINT)
    output, errors = ended(process, 130)
    step = len(metrics(run, 'train/loss'))
    assert f'stopped by Ctrl-C after update {step}: checkpoint saved, the same command continues' in output
    assert errors == 'jaxtune: Ctrl-C: saving after this update; once more leaves at once\n'
    assert 'not finished' in (run / 'report.html').read_text()
    assert not (run / 'result.json').exists()
    losses = metrics(run, 'train/loss')

    process = start(path, run)
    wait_for(lambda: updates(run) >= step + 5, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)  # two that come as one are one
    with contextlib.suppress(ProcessLookupError):  # it may leave between being asked for and being sent to
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
    output, _ = ended(process, 130)
    assert f'continuing from checkpoint {step} of 5000' in output
    assert metrics(run, 'train/loss')[:step] == losses


TASKS = {
    'evaluate': {'eval.batch_size': 8},
    'generate': {'data.format': 'prompt', 'generate.max_new_tokens': 16},
    'compile': {},
    'prepare': {'data.vocab_size': 400},
}


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=['TERM', 'INT'])
def test_what_has_nothing_to_save_ends_at_once(corpus, tmp_path, task, number, status):
    keys, run = recipe(corpus) | {'task': task} | TASKS[task], tmp_path / 'run'
    if task == 'prepare':  # so much that it is not done before it is told to stop
        keys['data.train'] = str(tmp_path / 'many.jsonl')
        lines = (json.dumps({'text': f'{SENTENCE} {number} ' * 8}) + '\n' for number in range(20000))
        (tmp_path / 'many.jsonl').write_text(''.join(lines))
    path = write_recipe(tmp_path / 'recipe.py', keys)
    process = start(path, run)
    wait_for((run / 'config.json').exists, process)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(number)
    began = time.monotonic()
    _, errors = ended(process, status)
    assert time.monotonic() - began < 10
    assert errors.count('\n') == 1
    assert 'the same command continues' in errors
    # Nothing that it left keeps the same command from its end.
    if (task, number) == ('prepare', signal.SIGTERM):
        ended(start(path, run), 0)
        assert json.loads((run / 'result.json').read_text())['status'] == 'done'


def test_sigterm_after_the_end_takes_nothing_back():
    code = """
        import atexit, os, signal, sys, time
        atexit.register(time.sleep, 1)  # run last: the signal has its time
        atexit.register(os.kill, os.getpid(), signal.SIGTERM)
        sys.argv = ['jaxtune', 'recipes']
        from jaxtune.main import cli
        cli()
    """
    made = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, '')
    assert 'sft' in made.stdout
