"""Reinforcement learning with an environment as a whole: what it does to the reward, on meshes, and when it goes on."""

import signal

import numpy as np
import pytest
from runs import exported, metrics, start, write_recipe
from test_pod import finish, start_pod
from test_resume import updates, wait_for
from test_rl import go, rl_recipe, samples

from jaxtune import main
from jaxtune.errors import UserError


def recipe(corpus, task='grpo', **changes) -> dict:
    keys = rl_recipe(corpus, task, **changes)
    return keys | {'rl.reward': '', 'rl.environment': 'worlds:LETTERS'}


@pytest.mark.parametrize('task', [pytest.param('grpo', marks=pytest.mark.exhaustive), 'ppo'])
def test_its_reward_rises(corpus, tmp_path, task):
    steps = 16
    changes = {'train.steps': steps, 'rl.rollouts': 64, 'rl.kl_coef': 0.0, 'optimizer.lr': 4e-3, 'eval.every': steps}
    result, _ = go(recipe(corpus, task) | changes | {'train.batch_size': 32, 'generate.batch_size': 32}, tmp_path)
    sampled = metrics(tmp_path, f'{task}/reward')
    assert sampled[0] < 0.2
    assert np.mean(sampled[-3:]) > sampled[0] + 0.3
    assert metrics(tmp_path, f'{task}/reward/environment') == sampled
    assert metrics(tmp_path, f'{task}/turns')[0] > 1
    assert result['metrics']['eval/turns'] > 1
    for line in samples(tmp_path):
        own = [part['text'] for part in line['exchange'] if part['from'] == 'model']
        theirs = [part['text'] for part in line['exchange'] if part['from'] == 'environment']
        counts = np.cumsum([text.count('e') for text in own])
        assert theirs == [f'({count})' for count in counts[: len(theirs)]]
        assert all(text in line['completion'] for text in theirs)
        assert line['score'] == line['scores']['environment']
        assert counts[-1] >= line['score'] >= counts[-2:][0]  # a turn that was cut is not asked about


def test_it_is_added_to_a_reward(corpus, tmp_path):
    keys = recipe(corpus, train__steps=2, data__eval='') | {'rl.reward': 'length:0.5', 'rl.length_target': 8}
    go(keys, tmp_path)
    for whole, own, added in zip(
        *(metrics(tmp_path, f'grpo/{name}') for name in ('reward', 'reward/length', 'reward/environment')), strict=True
    ):
        assert whole == pytest.approx(0.5 * own + added, rel=1e-5)


def test_a_killed_run_ends_as_if_nothing_had_been(corpus, tmp_path):
    path = write_recipe(tmp_path / 'recipe.py', recipe(corpus, train__steps=6, checkpoint__every=2, eval__every=6))
    whole = start(path, tmp_path / 'whole')
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    killed = start(path, tmp_path / 'killed')
    wait_for(lambda: updates(tmp_path / 'killed') >= 3, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=240)
    again = start(path, tmp_path / 'killed')
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert exported(tmp_path / 'killed') == exported(tmp_path / 'whole')
    assert samples(tmp_path / 'killed') == samples(tmp_path / 'whole')


def test_one_that_fails_loses_no_update(corpus, tmp_path, monkeypatch):
    keys = recipe(corpus, train__steps=3, data__eval='') | {'rl.environment': 'worlds:FAILS_ONCE'}
    go(keys, tmp_path / 'whole')
    monkeypatch.setenv('FAILS_AT_STEP', '60')
    with pytest.raises(UserError, match=r'worlds:FAILS_ONCE: \S*worlds.py:\d+: ValueError: now; it fails on the turn'):
        go(keys, tmp_path / 'failed')
    saved = [int(path.name) for path in (tmp_path / 'failed' / 'checkpoints').iterdir() if path.name.isdigit()]
    assert len(saved) == 1
    assert 0 < saved[0] < 3
    monkeypatch.delenv('FAILS_AT_STEP')
    go(keys, tmp_path / 'failed')
    assert exported(tmp_path / 'failed') == exported(tmp_path / 'whole')


@pytest.mark.parametrize(
    ('changes', 'task', 'sizes'),
    [
        ({}, 'grpo', (1, 2, 2, 2)),
        pytest.param({}, 'ppo', (8, 1, 1, 1), marks=pytest.mark.exhaustive),
        pytest.param(
            {'rl.advantage': 'leave_one_out', 'rl.kl_in': 'reward', 'rl.normalise': 'constant'},
            'grpo',
            (2, 2, 2, 1),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param({'rl.ratio': 'sequence', 'rl.overlong': 'soft'}, 'grpo', (2, 4), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_mesh_learns_what_one_device_does(corpus, tmp_path, changes, task, sizes):
    keys = recipe(corpus, task, train__steps=2) | changes
    go(keys, tmp_path / 'one')
    go(keys, tmp_path / 'mesh', (*sizes, 1, 1)[:4])
    at_start = [[line for line in samples(tmp_path / name) if not line['step']] for name in ('one', 'mesh')]
    assert at_start[0] == at_start[1]
    for name in ('train/loss', 'train/grad_norm', f'{task}/reward', f'{task}/turns', f'{task}/length'):
        one, mesh = metrics(tmp_path / 'one', name), metrics(tmp_path / 'mesh', name)
        np.testing.assert_allclose(one, mesh, rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.exhaustive
def test_packing_changes_nothing(corpus, tmp_path):
    keys = recipe(corpus, 'ppo', train__steps=2, data__eval='')
    go(keys, tmp_path / 'packed')
    go(keys | {'data.packing': False}, tmp_path / 'alone')
    for name in ('train/loss', 'train/grad_norm'):
        np.testing.assert_allclose(metrics(tmp_path / 'packed', name), metrics(tmp_path / 'alone', name), rtol=2e-3)


def test_two_hosts_exchange_as_one(corpus, tmp_path):
    path = write_recipe(tmp_path / 'recipe.py', recipe(corpus, 'grpo', train__steps=2, mesh__fsdp=2))
    process = start(path, tmp_path / 'one', devices=4)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    codes, ended = finish(start_pod(path, tmp_path / 'two'))
    assert codes == [0, 0], ended
    at_start = [[line for line in samples(tmp_path / name) if not line['step']] for name in ('one', 'two')]
    assert at_start[0] == at_start[1]
    for name in ('train/loss', 'grpo/reward', 'grpo/turns'):
        np.testing.assert_allclose(metrics(tmp_path / 'one', name), metrics(tmp_path / 'two', name), rtol=1e-3)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'rl.environment': 'calculater'}, ('rl.environment=', 'expected one of (empty), calculator', 'nearest')),
        ({'rl.environment': 'worlds:GONE'}, ('rl.environment=worlds:GONE', "has no 'GONE'")),
        ({'rl.environment': 'worlds:number'}, ('expected a jaxtune Environment, found int',)),
        ({'rl.environment': ''}, ("rl.reward='': expected a reward model's workdir",)),
        ({'rl.max_turns': 0}, ('rl.max_turns=0: expected an integer >= 1',)),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_line(corpus, tmp_path, capsys, changes, said):
    path = write_recipe(tmp_path / 'recipe.py', recipe(corpus) | changes)
    status = main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')])
    errors = capsys.readouterr().err.strip()
    assert status == 2, errors
    assert '\n' not in errors
    assert all(part in errors for part in said), errors
