"""Advantages of every kind, and the divergence taken off the reward, beside plain loops, PyTorch and TRL."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.recipe import recipes
from jaxtune.rl import RolloutBatch, advantages, grpo, ppo
from jaxtune.rl.choices import choose

GROUPS, GROUP, WIDTH = 3, 4, 6
ROWS = GROUPS * GROUP
TASKS = {'ppo': ppo, 'grpo': grpo}


def rl(**changes):
    found = recipes.defaults()
    recipes.apply_overrides(found, {f'rl.{key}': x for key, x in ({'group': GROUP} | changes).items()})
    return found.rl


def rollouts(seed: int) -> RolloutBatch:
    rng = np.random.default_rng(seed)
    mask = (np.arange(WIDTH) < rng.integers(1, WIDTH + 1, (ROWS, 1))).astype(np.float32)
    old, reference, values = (rng.normal(-1, 0.5, (3, ROWS, WIDTH)) * mask).astype(np.float32)
    scores = rng.integers(0, 3, ROWS).astype(np.float32)
    scores[:GROUP] = scores[0]  # one group with nothing to tell apart
    return RolloutBatch(old, reference, values, mask, scores)


ESTIMATORS = {'k1': lambda d: -d, 'k2': lambda d: d**2 / 2, 'k3': lambda d: np.exp(d) - 1 - d}


def costs(s, batch, estimator):
    """What each token's divergence takes off the reward, `[answers, width]`."""
    away = ESTIMATORS[estimator]((batch.reference - batch.old).astype(np.float64))
    return s.kl_coef * away * batch.mask


@pytest.mark.parametrize('advantage', ['group', 'group_mean', 'leave_one_out'])
@pytest.mark.parametrize('kl_in', ['reward', 'loss'])
@pytest.mark.parametrize('task', TASKS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), estimator=st.sampled_from(list(ESTIMATORS)))
def test_an_answer_is_measured_by_its_group(task, advantage, kl_in, seed, estimator):
    if kl_in == 'loss' and estimator == 'k1':
        estimator = 'k2'
    s, batch = rl(advantage=advantage, kl_in=kl_in, kl=estimator, kl_coef=0.3), rollouts(seed)
    fields, metrics = TASKS[task].ALGORITHM.compute_advantages(s, batch)
    scores = batch.scores.astype(np.float64)
    if kl_in == 'reward':
        scores = scores - costs(s, batch, estimator).sum(1)
    for first in range(0, ROWS, GROUP):
        group = scores[first : first + GROUP]
        for place, score in enumerate(group):
            others = np.delete(group, place)
            want = {
                'group': (score - group.mean()) / (group.std(ddof=1) + 1e-4),
                'group_mean': score - group.mean(),
                'leave_one_out': score - others.mean(),
            }[advantage]
            row = first + place
            np.testing.assert_allclose(fields['advantages'][row], want * batch.mask[row], rtol=2e-3, atol=2e-4)
    alike = [len(set(batch.scores[first : first + GROUP].tolist())) == 1 for first in range(0, ROWS, GROUP)]
    assert float(metrics['frac_reward_zero_std']) == pytest.approx(np.mean(alike))
    assert tuple(fields) == choose(s, TASKS[task].CHOICES).token_fields


@pytest.mark.parametrize('kl_in', ['reward', 'loss'])
@pytest.mark.parametrize('task', TASKS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), estimator=st.sampled_from(['k2', 'k3']), gamma=st.sampled_from([0.9, 1.0]))
def test_a_token_is_measured_by_a_value_head(task, kl_in, seed, estimator, gamma):
    s = rl(advantage='gae', kl_in=kl_in, kl=estimator, kl_coef=0.3, gamma=gamma, gae_lambda=0.8, normalise='constant')
    batch = rollouts(seed)
    fields, _ = TASKS[task].ALGORITHM.compute_advantages(s, batch)
    taken = costs(s, batch, estimator) if kl_in == 'reward' else np.zeros((ROWS, WIDTH))
    gains = np.zeros((ROWS, WIDTH))
    for row, size in enumerate(batch.mask.sum(1).astype(int)):
        rewards = -taken[row, :size]
        rewards[-1] += batch.scores[row]
        values = [*batch.values[row, :size].astype(np.float64), 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(size)]
        gains[row, :size] = [sum((gamma * 0.8) ** k * d for k, d in enumerate(deltas[t:])) for t in range(size)]
    np.testing.assert_allclose(fields['returns'], (gains + batch.values) * batch.mask, rtol=1e-3, atol=1e-4)
    of_tokens = gains[batch.mask > 0]
    white = (gains - of_tokens.mean()) / np.sqrt(of_tokens.var(ddof=1) + 1e-8) * batch.mask
    np.testing.assert_allclose(fields['advantages'], white, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(fields['constant'], batch.mask / WIDTH)
    assert ('reference' in fields) == (kl_in == 'loss')


def test_groups_that_are_all_alike_teach_exactly_nothing():
    scores = np.full((2, 6), 12345.678, np.float32)  # of which a mean is not always the number
    for name in ('group_normalised', 'above_mean', 'leave_one_out'):
        np.testing.assert_array_equal(getattr(advantages, name)(scores), 0.0)
