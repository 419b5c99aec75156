"""The command on two hosts at once: they are one run, stop together and go on together."""

import pathlib
import re
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
from child import Child
from runs import metrics, recipe, start, train, write_recipe
from test_resume import updates, wait_for
from test_rl import rl_recipe, samples

LOCAL = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'local.py'
environments = runpy.run_path(str(LOCAL))['environments']


def start_pod(path, workdir, *flags):
    """The command on two hosts with two devices each."""
    words = ['--config', path, '--workdir', workdir, *flags]
    return [Child(words, path.parent, 2, environment) for environment in environments(2, 2)]


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
    words = [sys.executable, LOCAL, '--processes', '2', '--', '--config', path, '--workdir', tmp_path / 'run']
    ended = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2, ended
    told = [line.removeprefix('[1] ') for line in ended.stderr.splitlines() if 'data.train=not/there.jsonl' in line]
    assert len(told) == 2, ended
    assert told[0] == told[1]


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


def test_two_processes_as_slices_give_the_losses_of_one_device(corpus, tmp_path):
    keys = recipe(corpus, train__steps=8)
    train(keys, tmp_path / 'one')
    path = write_recipe(tmp_path / 'recipe.py', keys | {'mesh.slices': 2, 'mesh.fsdp': 2})
    codes, ended = finish(start_pod(path, tmp_path / 'two'))
    assert codes == [0, 0], ended
    for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
        np.testing.assert_allclose(metrics(tmp_path / 'two', name), metrics(tmp_path / 'one', name), rtol=1e-5)


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
