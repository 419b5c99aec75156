"""The loss of every combination of keys, beside plain numpy and TRL; today's PPO and GRPO to the last bit."""

import collections
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.recipe import recipes
from jaxtune.rl import grpo, losses, ppo
from jaxtune.rl.choices import ADVANTAGES, KL_ESTIMATORS, KL_PLACES, NORMALISERS, RATIOS, choose
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.rollouts import Rollouts

ROWS, LENGTH, WIDTH = 8, 24, 10
TASKS = {'ppo': ppo, 'grpo': grpo}


def rl(**changes):
    found = recipes.defaults()
    recipes.apply_overrides(found, {f'rl.{key}': x for key, x in changes.items()})
    return found.rl


def made(seed: int) -> tuple[Rollouts, np.ndarray, dict[str, np.ndarray]]:
    """Answers of any length, what of them is a token `[answers, width]`, and numbers of these tokens."""
    rng = np.random.default_rng(seed)
    start = rng.integers(1, LENGTH - WIDTH + 1, ROWS).astype(np.int32)
    sizes = rng.integers(1, WIDTH + 1, ROWS).astype(np.int32)
    sizes[:2] = 1, WIDTH
    end = start + sizes
    tokens = rng.integers(1, 64, (ROWS, LENGTH)).astype(np.int32) * (np.arange(LENGTH) < end[:, None])
    empty = np.zeros((ROWS, WIDTH), np.float32)
    rollouts = Rollouts((None,) * ROWS, ('',) * ROWS, tokens, start, end, np.ones(ROWS, bool), empty)
    mask = (np.arange(WIDTH) < sizes[:, None]).astype(np.float32)
    numbers = {name: -rng.uniform(0, 3, mask.shape) for name in ('old', 'reference', 'logps')}
    numbers['logps'] = numbers['old'] + rng.normal(0, 0.4, mask.shape)
    numbers |= {name: rng.normal(size=mask.shape) for name in ('values', 'new_values', 'returns')}
    numbers['advantages'] = np.repeat(rng.normal(size=(ROWS, 1)), WIDTH, 1)  # of an answer
    numbers['entropies'] = rng.uniform(0, 4, mask.shape)
    return rollouts, mask, {name: (x * mask).astype(np.float32) for name, x in numbers.items()}


def ours(settings, task, seed, packing=True):
    """`(mean loss, metrics)` of packed rows, of the task with these settings."""
    rollouts, mask, numbers = made(seed)
    rows = RolloutPacker(rollouts, np.arange(ROWS), LENGTH, packing)
    spread = {name: rows.spread(x) for name, x in numbers.items()}
    chosen = choose(settings, TASKS[task].CHOICES)
    if chosen.normalise == 'constant':
        spread['constant'] = rows.spread(mask / WIDTH)
    if not settings.entropy_coef:
        del spread['entropies']
    batch = rows.fields() | spread
    total, count, sums = losses.loss(chosen, settings, spread['logps'], spread['new_values'], batch)
    means = {name: float(x / count) for name, x in sums.items()}
    return float(total / count), means, (mask, numbers)


def closed_form(s, task, mask, x):
    """The same in numpy, an answer at a time, by the papers' equations."""
    chosen = choose(s, TASKS[task].CHOICES)
    high = s.clip if s.clip_high in ('auto', 0) else s.clip_high
    per_answer, sizes = [], mask.sum(1).astype(int)
    for row, size in enumerate(sizes):
        logps, old, advantages = (x[name][row, :size].astype(np.float64) for name in ('logps', 'old', 'advantages'))
        of_sequence = np.full(size, np.exp(np.mean(logps - old)))
        ratio = of_sequence if chosen.ratio == 'sequence' else np.exp(logps - old)
        each = []
        for r, a in zip(ratio, advantages, strict=True):
            value = min(r * a, min(max(r, 1 - s.clip), 1 + high) * a)
            if s.dual_clip and a < 0:
                value = max(value, s.dual_clip * a)
            each.append(-value)
        each = np.asarray(each)
        if chosen.kl_in == 'loss':
            log_r = x['reference'][row, :size] - logps
            each += s.kl_coef * (log_r**2 / 2 if chosen.kl == 'k2' else np.exp(log_r) - 1 - log_r)
        if not chosen.grouped:
            now, before, wanted = (x[name][row, :size] for name in ('new_values', 'values', 'returns'))
            near = np.clip(now, before - s.value_clip, before + s.value_clip)
            each += s.value_coef * 0.5 * np.maximum((now - wanted) ** 2, (near - wanted) ** 2)
        if s.entropy_coef:
            each -= s.entropy_coef * x['entropies'][row, :size]
        per_answer.append(each)
    if chosen.normalise == 'answer':
        return np.mean([each.mean() for each in per_answer])
    if chosen.normalise == 'token':
        return np.concatenate(per_answer).mean()
    return sum(each.sum() for each in per_answer) / (ROWS * WIDTH)


def sensible(task, advantage, ratio, normalise, kl, kl_in):
    """Whether the combination is one that makes sense, written out."""
    if advantage == 'gae' and ratio == 'sequence':
        return False
    if ratio == 'sequence' and normalise != 'answer':
        return False
    return not (kl == 'k1' and kl_in == 'loss')


COMBINATIONS = list(itertools.product(TASKS, ADVANTAGES, RATIOS, NORMALISERS, KL_ESTIMATORS, KL_PLACES))


@pytest.mark.parametrize('combination', [c for c in COMBINATIONS if sensible(*c)], ids='-'.join)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clip_high=st.sampled_from(['auto', 0, 0.28, 0.1]),
    dual=st.sampled_from([0.0, 1.5]),
    entropy=st.sampled_from([0.0, 0.1]),
    packing=st.booleans(),
)
def test_every_combination_is_its_closed_form(combination, seed, clip_high, dual, entropy, packing):
    task, *choices = combination
    names = ('advantage', 'ratio', 'normalise', 'kl', 'kl_in')
    keys = dict(zip(names, choices, strict=True)) | {'clip_high': clip_high, 'dual_clip': dual, 'kl_coef': 0.3}
    s = rl(**keys, entropy_coef=entropy)
    found, _, (mask, numbers) = ours(s, task, seed, packing)
    np.testing.assert_allclose(found, closed_form(s, task, mask, numbers), rtol=2e-5, atol=2e-6)


@functools.cache
def trl_trainer():
    return pytest.importorskip('trl.trainer.grpo_trainer').GRPOTrainer


def trl_loss(s, loss_type, level, mask, x, high):
    """TRL's own `_compute_loss` on these log-probabilities."""
    torch = pytest.importorskip('torch')
    t = {name: torch.tensor(value) for name, value in x.items()}
    accelerator = types.SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    args = types.SimpleNamespace(delta=s.dual_clip or None, use_bias_correction_kl=False, steps_per_generation=1)
    logps = (t['logps'], t['entropies'], None)
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: logps, top_entropy_quantile=1.0, beta=s.kl_coef, args=args,
        off_policy_mask_threshold=None, importance_sampling_level=level, loss_type=loss_type, epsilon_low=s.clip,
        epsilon_high=high, use_vllm=False, model=types.SimpleNamespace(training=True), aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=WIDTH, accelerator=accelerator,
        _entropy_bonus_enabled=bool(s.entropy_coef), entropy_coef=s.entropy_coef, use_adaptive_entropy=False,
        _metrics={'train': collections.defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.long)
    inputs = {'prompt_ids': ids[:, :1], 'prompt_mask': ids[:, :1], 'completion_ids': ids}
    inputs |= {'completion_mask': torch.tensor(mask), 'advantages': t['advantages'][:, 0]}
    inputs |= {'old_per_token_logps': t['old'], 'ref_per_token_logps': t['reference']}
    inputs['num_items_in_batch'] = torch.tensor(mask.sum())
    return float(trl_trainer()._compute_loss(trainer, None, inputs)), trainer._metrics['train']


@pytest.mark.parametrize(
    ('loss_type', 'level', 'keys'),
    [
        ('grpo', 'token', {}),
        ('grpo', 'token', {'clip_high': 0.28, 'dual_clip': 1.5}),
        ('bnpo', 'token', {'normalise': 'token', 'entropy_coef': 0.1}),
        ('dapo', 'token', {'normalise': 'token', 'clip_high': 0.28}),
        ('dr_grpo', 'token', {'normalise': 'constant', 'advantage': 'group_mean'}),
        ('grpo', 'sequence', {'ratio': 'sequence', 'clip': 0.05, 'clip_high': 0.06}),
    ],
)
@pytest.mark.parametrize('seed', [0, 1])
def test_losses_and_clip_shares_are_trls(loss_type, level, keys, seed):
    s = rl(**({'kl_coef': 0.04} | keys))
    found, means, (mask, x) = ours(s, 'grpo', seed)
    high = s.clip if s.clip_high == 'auto' else s.clip_high
    theirs, metrics = trl_loss(s, loss_type, level, mask, x, high)
    np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-6)
    if keys.get('normalise') == 'token':  # theirs are over tokens whatever the loss is over
        np.testing.assert_allclose(means['clip_low_fraction'], metrics['clip_ratio/low_mean'][0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(means['reference_kl'], metrics['kl'][0], rtol=1e-4)
        np.testing.assert_allclose(
            means['clip_high_fraction'], metrics['clip_ratio/high_mean'][0], rtol=1e-4, atol=1e-6
        )


def test_the_gradient_of_a_sequence_ratio_is_that_of_gspos_equation():
    """GSPO, equation 10: `s * A * mean over tokens of grad log p`, where nothing is clipped."""
    s = rl(ratio='sequence', clip=100.0, kl_coef=0.0)
    rollouts, mask, x = made(3)
    rows = RolloutPacker(rollouts, np.arange(ROWS), LENGTH, True)
    spread = {name: rows.spread(value) for name, value in x.items()}
    del spread['entropies']
    chosen = choose(s, grpo.CHOICES)

    def mean(logps):
        total, count, _ = losses.loss(chosen, s, logps, spread['values'], rows.fields() | spread)
        return total / count

    found = rows.gather(np.asarray(jax.grad(mean)(jnp.asarray(spread['logps']))))
    sizes = mask.sum(1, keepdims=True)
    ratio = np.exp(((x['logps'] - x['old']) * mask).sum(1, keepdims=True) / sizes)
    np.testing.assert_allclose(found, -ratio * x['advantages'] / sizes * mask / ROWS, rtol=1e-4, atol=1e-7)


def test_divergence_estimators_agree_on_average_and_in_the_gradient():
    """Over draws from the policy: k1 and k3 have the mean of the divergence, k2 and k3 its gradient, k1 none."""
    rng = np.random.default_rng(0)
    policy, reference = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(2))
    log_q = jax.nn.log_softmax(reference)

    def expected(logits, estimator):
        """Under draws that do not follow the gradient, as in a loss."""
        log_p = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(log_p)) * losses.divergence(estimator, log_q, log_p)).sum()

    def true(logits):
        log_p = jax.nn.log_softmax(logits)
        return (jnp.exp(log_p) * (log_p - log_q)).sum()

    for estimator in ('k1', 'k3'):
        np.testing.assert_allclose(expected(policy, estimator), true(policy), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(expected)(policy, 'k1'), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(policy, 'k2'), jax.grad(true)(policy), rtol=1e-4, atol=1e-6)
    # k3's is that of the other direction, from the reference, as near the reference as one likes the same.
    near = log_q + 1e-2 * policy
    np.testing.assert_allclose(jax.grad(expected)(near, 'k3'), jax.grad(true)(near), atol=1e-4)


def as_it_was(task, s, logps, values, batch):
    """The losses of PPO and GRPO before they were one family, written out."""
    mask, shares = batch['loss_mask'], batch['shares']
    difference = (logps - batch['old']) * mask
    ratio = jnp.exp(difference)
    free = -batch['advantages'] * ratio
    clipped = -batch['advantages'] * jnp.clip(ratio, 1.0 - s.clip, 1.0 + s.clip)
    each = jnp.maximum(free, clipped)
    if task == 'grpo':
        away = batch['reference'] - logps
        kl = (jnp.exp(away) - 1.0 - away) * mask
        return ((each + s.kl_coef * kl) * shares).sum() / shares.sum()
    free = jnp.square(values - batch['returns'])
    near = jnp.clip(values, batch['values'] - s.value_clip, batch['values'] + s.value_clip)
    off = 0.5 * jnp.maximum(free, jnp.square(near - batch['returns']))
    return ((each + s.value_coef * off) * mask).sum() / mask.sum()


@pytest.mark.parametrize('task', TASKS)
def test_todays_ppo_and_grpo_are_the_same_to_the_last_bit(task):
    s = rl()
    rollouts, _, numbers = made(7)
    rows = RolloutPacker(rollouts, np.arange(ROWS), LENGTH, True)
    spread = {name: jnp.asarray(rows.spread(x)) for name, x in numbers.items()}
    del spread['entropies']
    batch = rows.fields() | spread

    def mean(logps, values):
        total, count, _ = TASKS[task].ALGORITHM.loss(s, logps, values, batch)
        return total / count

    new = jax.jit(jax.value_and_grad(mean, (0, 1)))(spread['logps'], spread['new_values'])
    old = jax.jit(jax.value_and_grad(lambda *a: as_it_was(task, s, *a, batch), (0, 1)))(
        spread['logps'], spread['new_values']
    )
    jax.tree.map(np.testing.assert_array_equal, new, old)
    algorithm = TASKS[task].ALGORITHM
    asked = {'token_fields': algorithm.token_fields, 'value_head': task == 'ppo', 'reference': True}
    assert algorithm.adapted(s) == asked
    asked['token_fields'] = tuple(name for name in algorithm.token_fields if name != 'reference')
    assert algorithm.adapted(rl(kl_coef=0.0)) == asked | {'reference': False}
