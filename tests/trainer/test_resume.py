"""A run that is killed at any moment and started again ends with the very weights of one that was not."""

import signal
import time

import numpy as np
import pytest
from runs import OBJECTIVES, exported, metrics, recipe, start, train, write_recipe

STEPS = 60  # of 16 rows: the second epoch begins after about 10, the sixth ends with the run


# By default one objective is killed; test_meshes goes on from a checkpoint of one of every kind.
CASES = [pytest.param(name, marks=() if name == OBJECTIVES[0] else pytest.mark.exhaustive) for name in OBJECTIVES]


@pytest.fixture(scope='module', params=CASES)
def whole(request, corpus, tmp_path_factory):
    """The recipe's path, and the workdir of its uninterrupted run."""
    folder = tmp_path_factory.mktemp('resume')
    keys = recipe(corpus, request.param, train__steps=STEPS, eval__every=25, checkpoint__every=7)
    path = write_recipe(folder / 'recipe.py', keys)
    run(path, folder / 'whole')
    return path, folder / 'whole'


def run(path, workdir):
    process = start(path, workdir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def updates(workdir):
    try:
        return (workdir / 'metrics.jsonl').read_bytes().count(b'"train/loss"')
    except FileNotFoundError:
        return 0


def saving(workdir):
    """Whether a checkpoint is being written right now."""
    folder = workdir / 'checkpoints'
    return folder.is_dir() and any('tmp' in entry.name for entry in folder.iterdir())


def assert_same(workdir, reference):
    assert exported(workdir) == exported(reference)
    for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
        assert metrics(workdir, name) == metrics(reference, name)
    assert len(metrics(workdir, 'train/loss')) == STEPS


def test_killed_three_times_and_told_to_stop_it_ends_the_same(whole, tmp_path):
    path, reference = whole
    moment = np.random.default_rng().integers(20, 30)  # in the second epoch or later
    print(f'killed during the first save, stopped at 12, killed after update {moment} and during a later save')

    def kill_when(condition):
        process = start(path, tmp_path)
        wait_for(condition, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / 'result.json').exists()

    kill_when(lambda: saving(tmp_path))

    process = start(path, tmp_path)
    wait_for(lambda: updates(tmp_path) >= 12, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 143, errors
    assert 'checkpoint saved' in output
    assert not errors.strip()

    kill_when(lambda: updates(tmp_path) >= moment)
    kill_when(lambda: updates(tmp_path) >= 35 and saving(tmp_path))
    run(path, tmp_path)
    assert_same(tmp_path, reference)


def test_what_is_done_is_not_done_again(whole):
    path, reference = whole
    again = start(path, reference)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert 'already done' in output


def test_a_resumed_run_may_change_its_mesh_and_grow(corpus, tmp_path):
    keys = recipe(corpus, optimizer__schedule='constant', eval__every=0)
    train(keys, tmp_path / 'whole')
    train({**keys, 'train.steps': 8}, tmp_path / 'grown')
    train(keys, tmp_path / 'grown', (2, 2, 1, 1))
    assert metrics(tmp_path / 'grown', 'train/loss')[:8] == metrics(tmp_path / 'whole', 'train/loss')[:8]
    np.testing.assert_allclose(
        metrics(tmp_path / 'grown', 'train/loss'), metrics(tmp_path / 'whole', 'train/loss'), rtol=1e-5
    )
