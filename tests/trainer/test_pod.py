"""The command on two hosts at once: they are one run, stop together and go on together."""

import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from child import Child
from runs import metrics, recipe, start, write_recipe
from test_resume import updates, wait_for
from test_rl import rl_recipe, samples


def pod() -> list[dict[str, str]]:
    """The environments of two processes that find each other."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    common = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_PROCESSES': '2', 'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
    return [common | {'JAX_PROCESS_ID': str(i)} for i in range(2)]


def start_pod(path, workdir):
    """The command on two hosts with two devices each."""
    words = ['--config', path, '--workdir', workdir]
    return [Child(words, path.parent, 2, environment) for environment in pod()]


def finish(processes):
    ended = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], ended


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """A recipe of two stages of training over four devices, and its run on one host."""
    folder = tmp_path_factory.mktemp('pod')
    keys = recipe(corpus, train__steps=40, mesh__fsdp=2, eval__every=20, checkpoint__every=30, eval__by_position=2)
    path = write_recipe(folder / 'recipe.py', keys)
    process = start(path, folder / 'whole', devices=4)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return path, folder / 'whole'


def test_two_hosts_are_one_run_also_when_one_is_told_to_stop(whole, tmp_path):
    path, reference = whole
    processes = start_pod(path, tmp_path)
    wait_for(lambda: updates(tmp_path) >= 5, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, ended = finish(processes)
    assert codes == [143, 143], ended
    assert 0 < len(metrics(tmp_path, 'train/loss')) < 40
    codes, ended = finish(start_pod(path, tmp_path))
    assert codes == [0, 0], ended
    for name in ('train/loss', 'eval/loss', 'eval/loss_by_position/0-31', 'eval/loss_by_position/32-63'):
        np.testing.assert_allclose(metrics(tmp_path, name), metrics(reference, name), rtol=1e-5)
    assert 'continuing from checkpoint' in ended[0][0]
    # Only process 0 prints; the CPU's own collectives, which no accelerator uses, greet on every host, all at once.
    greeting = r'\[Gloo\]|Rank|\d+|is|connected|to|peer|ranks?|Expected|number|of|[.:\s]'
    assert not re.sub(greeting, '', ended[1][0])
    sizes = [(folder / 'export' / 'model.safetensors').stat().st_size for folder in (tmp_path, reference)]
    assert sizes[0] == sizes[1]


def test_a_mistake_ends_all_of_them(corpus, tmp_path):
    path = write_recipe(tmp_path / 'recipe.py', recipe(corpus) | {'data.train': 'not/there.jsonl'})
    words = [sys.executable, '-m', 'jaxtune.main', '--config', str(path), '--workdir', str(tmp_path / 'run')]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    codes, ended = finish([subprocess.Popen(words, env=os.environ | environment, **pipes) for environment in pod()])
    assert codes == [2, 2], ended
    assert 'data.train=not/there.jsonl' in ended[0][1]


def test_two_hosts_answer_and_score_as_one(corpus, tmp_path):
    keys = rl_recipe(corpus, 'ppo', train__steps=2, mesh__fsdp=2)
    path = write_recipe(tmp_path / 'recipe.py', keys)
    process = start(path, tmp_path / 'one', devices=4)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    codes, ended = finish(start_pod(path, tmp_path / 'two'))
    assert codes == [0, 0], ended
    at_start = [[line for line in samples(tmp_path / name) if not line['step']] for name in ('one', 'two')]
    assert at_start[0] == at_start[1]
    for name in ('train/loss', 'ppo/reward', 'ppo/entropy'):
        np.testing.assert_allclose(metrics(tmp_path / 'one', name), metrics(tmp_path / 'two', name), rtol=1e-3)


@pytest.mark.parametrize('lost', [0, 1])
def test_a_lost_process_ends_the_others_with_a_line_that_names_it(whole, tmp_path, lost):
    path, _ = whole
    processes = start_pod(path, tmp_path)
    wait_for(lambda: updates(tmp_path) >= 3, processes[0])
    processes[lost].send_signal(signal.SIGKILL)
    codes, ended = finish(processes)
    assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, 143), ended
    told = [line for line in ended[1 - lost][1].splitlines() if line.startswith('jaxtune: ')]
    assert len(told) == 1, ended
    assert re.match(rf'jaxtune: process {lost} on \S+ was lost', told[0])
