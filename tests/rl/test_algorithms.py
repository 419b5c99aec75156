"""PPO and GRPO as their papers have them: advantages by plain loops, losses and gradients beside PyTorch's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxtune import models
from jaxtune.models import hf, value_head
from jaxtune.models.model import Head
from jaxtune.recipe import recipes
from jaxtune.rl import RolloutBatch, advantages, grpo, policy, ppo
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.rollouts import Rollouts
from jaxtune.tasks import specs

torch = pytest.importorskip('torch')

LLAMA = {
    'model_type': 'llama',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
}
ROWS, LENGTH, WIDTH = 8, 24, 10


def config(**changes) -> ConfigDict:
    found = recipes.defaults()
    recipes.apply_overrides(
        found, {'data.seq_len': LENGTH, **{key.replace('__', '.'): x for key, x in changes.items()}}
    )
    return found


def answers(rng) -> Rollouts:
    """Answers to prompts; one of a single token, one as long as can be."""
    start = rng.integers(1, LENGTH - WIDTH + 1, ROWS).astype(np.int32)
    sizes = rng.integers(1, WIDTH + 1, ROWS).astype(np.int32)
    sizes[:2] = 1, WIDTH
    end = start + sizes
    tokens = rng.integers(1, 64, (ROWS, LENGTH)).astype(np.int32) * (np.arange(LENGTH) < end[:, None])
    ended = np.ones(ROWS, bool)
    return Rollouts((None,) * ROWS, ('',) * ROWS, tokens, start, end, ended, np.zeros((ROWS, WIDTH), np.float32))


def weights_of(made: Rollouts) -> np.ndarray:
    return (np.arange(WIDTH) < (made.end - made.start)[:, None]).astype(np.float32)


def slow_advantages(rewards, values, gamma, decay):
    """The sum of the definition, `sum_l (gamma decay)^l delta_(t + l)`, of one answer's tokens."""
    values = [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
    return [sum((gamma * decay) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    decay=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_advantages_are_the_sum_of_their_definition(seed, gamma, decay):
    rng = np.random.default_rng(seed)
    weights = weights_of(answers(rng))
    rewards, values = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32) * weights
    found = np.asarray(advantages.gae(rewards, values, weights, gamma, decay))
    assert not found[weights == 0].any()
    for row in range(ROWS):
        here = weights[row] > 0
        want = slow_advantages(rewards[row, here].astype(float), values[row, here].astype(float), gamma, decay)
        np.testing.assert_allclose(found[row, here], want, rtol=1e-4, atol=1e-5)


def test_without_discount_advantages_are_all_reward_to_come_less_the_value():
    rng = np.random.default_rng(0)
    weights = weights_of(answers(rng))
    rewards, values = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32) * weights
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(
        advantages.gae(rewards, values, weights, 1.0, 1.0), (to_come - values) * weights, rtol=1e-4, atol=1e-5
    )


def test_whitened_as_trl_does():
    trl = pytest.importorskip('trl.experimental.ppo.ppo_trainer')
    rng = np.random.default_rng(1)
    x, weights = rng.normal(3, 5, (ROWS, WIDTH)).astype(np.float32), weights_of(answers(rng))
    mask = torch.tensor(weights) > 0
    theirs = trl.masked_whiten(torch.tensor(x), mask) * mask
    np.testing.assert_allclose(advantages.whiten(jnp.asarray(x), weights), theirs, rtol=1e-4, atol=1e-5)


def test_the_last_token_brings_the_score_and_every_token_pays_for_leaving_the_reference():
    rng = np.random.default_rng(2)
    weights = weights_of(answers(rng))
    old, reference = -rng.uniform(0, 4, (2, ROWS, WIDTH)).astype(np.float32) * weights
    scores = rng.normal(size=ROWS).astype(np.float32)
    found = RolloutBatch(old, reference, np.zeros_like(old), weights, scores)
    fields, _ = ppo.ALGORITHM.compute_advantages(config(rl__kl_coef=0.3, rl__gae_lambda=1.0).rl, found)
    for row, size in enumerate(weights.sum(1).astype(int)):
        costs = -0.3 * (old - reference)[row, :size]
        want = [costs[t:].sum() + scores[row] for t in range(size)]
        np.testing.assert_allclose(fields['returns'][row, :size], want, rtol=1e-4, atol=1e-5)
        assert not np.asarray(fields['returns'][row, size:]).any()


def test_an_answer_is_measured_by_its_siblings():
    scores = np.random.default_rng(3).normal(2, 3, (5, 4)).astype(np.float32)
    theirs = torch.tensor(scores)
    theirs = (theirs - theirs.mean(1, keepdim=True)) / (theirs.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(advantages.group_normalised(scores), theirs, rtol=1e-4, atol=1e-5)
    for score, size in ((7.0, 4), (0.7, 8), (100.1, 6), (12345.678, 6)):  # of which a mean is not always the number
        np.testing.assert_array_equal(advantages.group_normalised(jnp.full((2, size), score, jnp.float32)), 0.0)
        np.testing.assert_array_equal(advantages.whiten(jnp.full((2, size), score), jnp.ones((2, size))), 0.0)
    weights = weights_of(answers(np.random.default_rng(4)))
    zeros = np.zeros_like(weights)
    found = RolloutBatch(zeros, zeros, zeros, weights, np.asarray([1, 1, 1, 1, 0, 1, 2, 3], np.float32))
    fields, metrics = grpo.ALGORITHM.compute_advantages(config(rl__group=4).rl, found)
    assert metrics['frac_reward_zero_std'] == 0.5
    assert not np.asarray(fields['advantages'][:4]).any()
    chex.assert_shape(fields['advantages'], (ROWS, WIDTH))


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """A model with its parameters and a value head, and the same in `transformers`."""
    from transformers import AutoModelForCausalLM

    model = models.build(models.read_config(LLAMA))
    params = jax.jit(model.init)(jax.random.key(0))
    folder = tmp_path_factory.mktemp('rl') / 'model'
    hf.save(folder, model, params)
    head = {'kernel': jax.random.normal(jax.random.key(1), (32, 1)) * 0.2, 'bias': jnp.full(1, 0.1)}
    return model, params | {value_head.NAME: head}, AutoModelForCausalLM.from_pretrained(folder)


def make_batch(seed: int = 5, packing: bool = True):
    """Answers, numbers of their tokens `[answers, width]`, and the rows that hold both."""
    rng = np.random.default_rng(seed)
    made = answers(rng)
    weights = weights_of(made)
    numbers = {name: rng.normal(size=weights.shape).astype(np.float32) * weights for name in ('advantages', 'returns')}
    numbers['values'] = rng.normal(0, 0.3, weights.shape).astype(np.float32) * weights
    # Near what the model says, so that some ratios are clipped and others not.
    for name in ('old', 'reference'):
        numbers[name] = (-np.log(64) + rng.normal(0, 0.3, weights.shape)).astype(np.float32) * weights
    rows = RolloutPacker(made, np.arange(ROWS), LENGTH, packing)
    return made, numbers, rows.fields() | {name: rows.spread(x) for name, x in numbers.items()}


def theirs(task: str, settings, torch_model, head, made, numbers):
    """The loss in PyTorch, by its definition, a row for every answer; with gradients in the model."""
    t = {name: torch.tensor(array) for name, array in numbers.items()}
    mask, tokens = torch.tensor(weights_of(made)), torch.tensor(made.tokens).long()
    attends = torch.arange(LENGTH)[None] < torch.tensor(made.end)[:, None]
    out = torch_model(input_ids=tokens, attention_mask=attends.long(), output_hidden_states=True)
    at = (torch.tensor(made.start)[:, None] + torch.arange(WIDTH)).clamp(max=LENGTH - 1)
    logprobs = torch.log_softmax(out.logits / settings.generate.temperature, -1)
    logprobs = logprobs.gather(1, (at - 1)[..., None].expand(-1, -1, 64)).gather(-1, tokens.gather(1, at)[..., None])
    logprobs = logprobs[..., 0] * mask
    ratio, rl = torch.exp(logprobs - t['old']), settings.rl
    clipped = torch.clamp(ratio, 1 - rl.clip, 1 + rl.clip)
    losses = torch.maximum(-t['advantages'] * ratio, -t['advantages'] * clipped)
    if task == 'grpo':
        away = torch.exp(t['reference'] - logprobs) - (t['reference'] - logprobs) - 1
        each = ((losses + rl.kl_coef * away) * mask).sum(1) / mask.sum(1)
        return each.mean()
    values = (out.hidden_states[-1] @ head['kernel'] + head['bias'])[..., 0].gather(1, at - 1) * mask
    near = t['values'] + torch.clamp(values - t['values'], -rl.value_clip, rl.value_clip)
    off = 0.5 * torch.maximum((values - t['returns']) ** 2, (near - t['returns']) ** 2)
    return ((losses + rl.value_coef * off) * mask).sum() / mask.sum()


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('task', ['ppo', 'grpo'])
def test_loss_and_gradients_are_pytorchs(both, task, temperature, packing):
    model, params, torch_model = both
    recipe = config(task=task, generate__temperature=temperature, rl__value_coef=0.5)
    algorithm = specs.bound_algorithm(recipe)
    made, numbers, batch = make_batch(packing=packing)
    assert (len(batch['tokens']) < ROWS) == packing

    def mean(params):
        total, count, _ = algorithm.loss(model, params, batch, None)
        return total / count

    loss, gradients = jax.jit(jax.value_and_grad(mean))(params)
    torch_model.zero_grad()
    head = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in params[value_head.NAME].items()}
    expected = theirs(task, recipe, torch_model, head, made, numbers)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    found = dict(torch_model.named_parameters())
    pairs = {
        'model.embed_tokens.weight': gradients['embed_tokens']['embedding'],
        'model.layers.1.mlp.down_proj.weight': gradients['layers']['mlp']['down_proj']['kernel'][1].T,
        'model.layers.0.self_attn.q_proj.weight': gradients['layers']['self_attn']['q_proj']['kernel'][0].T,
    }
    for name, ours in pairs.items():
        want = found[name].grad.numpy()
        # Relative to the largest: most of the entries of these gradients are near zero.
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)
    if task == 'ppo':
        for name, want in head.items():
            np.testing.assert_allclose(gradients[value_head.NAME][name], want.grad, rtol=1e-4, atol=1e-6)
    else:
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients[value_head.NAME]))


@pytest.mark.parametrize('task', ['ppo', 'grpo'])
def test_sums_over_parts_of_a_batch_are_those_of_the_whole(both, task):
    model, params, _ = both
    algorithm, (_, _, batch) = specs.bound_algorithm(config(task=task)), make_batch(packing=False)
    loss = jax.jit(lambda batch: algorithm.loss(model, params, batch, None))
    halves = [loss({name: x[half::2] for name, x in batch.items()}) for half in (0, 1)]
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *halves), loss(batch), rtol=1e-4, atol=1e-5)


def test_nothing_is_clipped_and_nothing_has_moved_before_the_first_update(both):
    model, params, _ = both
    losses = {task: specs.bound_algorithm(config(task=task)).loss for task in ('ppo', 'grpo')}
    _, _, batch = make_batch()
    old, values = policy.per_token_logps(model, params, batch, 1.0)
    batch |= {'old': old, 'values': values, 'returns': values, 'reference': old}
    _, count, sums = losses['ppo'](model, params, batch, None)
    assert sums['clip_fraction'] == sums['value_clip_fraction'] == sums['value_loss'] == 0
    np.testing.assert_allclose(sums['approx_kl'], 0, atol=1e-5)
    np.testing.assert_allclose(sums['policy_loss'], -batch['advantages'].sum(), rtol=1e-4)
    assert count == batch['loss_mask'].sum()
    assert losses['grpo'](model, params, batch, None)[2]['reference_kl'] == 0


def test_a_tempered_head_divides_the_logits():
    head = Head(jnp.ones((4, 6)), jnp.arange(6.0), scale=0.5)
    hidden = jnp.linspace(0, 1, 4)

    def logits(head):
        return head.scale * hidden @ head.kernel + head.bias

    np.testing.assert_allclose(logits(policy.tempered(head, 0.7)), logits(head) / 0.7, rtol=1e-6)
    assert policy.tempered(head, 1.0) is head


def test_a_new_value_head_says_nothing(both):
    model, params, _ = both
    fresh = value_head.with_value(value_head.policy(params), model)
    assert set(fresh) - set(value_head.policy(fresh)) == {value_head.NAME}
    assert not np.asarray(value_head.values(fresh, jnp.ones((2, 3, 32)))).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), packing=st.booleans(), unit=st.integers(1, 3))
def test_numbers_go_into_rows_and_come_back(seed, packing, unit):
    rng = np.random.default_rng(seed)
    made = answers(rng)
    chosen = rng.permutation(ROWS)[: rng.integers(1, ROWS + 1)]
    rows = RolloutPacker(made, chosen, LENGTH, packing, unit)
    assert rows.shape[0] % unit == 0
    assert rows.shape[0] <= -(-len(chosen) // unit) * unit
    numbers = rng.normal(size=(len(chosen), WIDTH)).astype(np.float32) * weights_of(made)[chosen]
    np.testing.assert_array_equal(rows.gather(rows.spread(numbers)), numbers)
    fields = rows.fields()
    assert fields['loss_mask'].sum() == (made.end - made.start)[chosen].sum()
    np.testing.assert_allclose(fields['shares'].sum(), len(chosen), rtol=1e-5)
    # What follows a place that predicts is the answer's own next token.
    followed = np.roll(fields['tokens'], -1, axis=1)
    np.testing.assert_array_equal(
        rows.gather(followed), [np.pad(made.tokens[i, made.start[i] : made.end[i]], (0, WIDTH))[:WIDTH] for i in chosen]
    )
    found = []
    for row, segment_ids in enumerate(fields['segment_ids']):
        for segment in range(1, segment_ids.max(initial=0) + 1):
            here = segment_ids == segment
            assert (np.flatnonzero(here) == np.flatnonzero(here)[0] + np.arange(here.sum())).all()
            np.testing.assert_array_equal(fields['positions'][row, here], np.arange(here.sum()))
            found.append(tuple(fields['tokens'][row, here].tolist()))
    assert sorted(found) == sorted(tuple(made.tokens[i, : made.end[i]].tolist()) for i in chosen)
