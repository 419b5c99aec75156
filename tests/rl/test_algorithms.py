"""PPO and GRPO as their papers have them: advantages by plain loops, losses and gradients beside PyTorch's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxtune import models, recipes
from jaxtune.models import hf, value
from jaxtune.models.model import Head
from jaxtune.rl import grpo, policy, ppo

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
ROWS, LENGTH = 8, 24


def config(**changes) -> ConfigDict:
    found = recipes.defaults()
    recipes.lay_over(found, {'data.seq_len': LENGTH, **{key.replace('__', '.'): x for key, x in changes.items()}})
    return found


def places(rng, rows: int = ROWS, length: int = LENGTH):
    """Where answers begin and end, `[rows]` each; one of a single token, one that fills its row."""
    start = rng.integers(1, length // 2, rows)
    end = np.minimum(start + rng.integers(1, length // 2, rows), length)
    end[0], end[1] = start[0] + 1, length
    return start.astype(np.int32), end.astype(np.int32)


def weights_of(start, end, length: int = LENGTH):
    at = np.arange(length)
    return ((at + 1 >= start[:, None]) & (at + 1 < end[:, None])).astype(np.float32)


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
    weights = weights_of(*places(rng))
    rewards, values = rng.normal(size=(2, ROWS, LENGTH)).astype(np.float32) * weights
    found = np.asarray(ppo.advantages(rewards, values, weights, gamma, decay))
    assert not found[weights == 0].any()
    for row in range(ROWS):
        here = weights[row] > 0
        want = slow_advantages(rewards[row, here].astype(float), values[row, here].astype(float), gamma, decay)
        np.testing.assert_allclose(found[row, here], want, rtol=1e-4, atol=1e-5)


def test_without_discount_advantages_are_all_reward_to_come_less_the_value():
    rng = np.random.default_rng(0)
    weights = weights_of(*places(rng))
    rewards, values = rng.normal(size=(2, ROWS, LENGTH)).astype(np.float32) * weights
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(
        ppo.advantages(rewards, values, weights, 1.0, 1.0), (to_come - values) * weights, rtol=1e-4, atol=1e-5
    )


def test_whitened_as_trl_does():
    trl = pytest.importorskip('trl.experimental.ppo.ppo_trainer')
    rng = np.random.default_rng(1)
    x, weights = rng.normal(3, 5, (ROWS, LENGTH)).astype(np.float32), weights_of(*places(rng))
    mask = torch.tensor(weights) > 0
    theirs = trl.masked_whiten(torch.tensor(x), mask) * mask
    np.testing.assert_allclose(ppo.whiten(jnp.asarray(x), weights), theirs, rtol=1e-4, atol=1e-5)


def test_the_last_token_brings_the_score_and_every_token_pays_for_leaving_the_reference():
    rng = np.random.default_rng(2)
    start, end = places(rng)
    weights = weights_of(start, end)
    old, reference = -rng.uniform(0, 4, (2, ROWS, LENGTH)).astype(np.float32) * weights
    scores = rng.normal(size=ROWS).astype(np.float32)
    found = policy.Found(old, reference, np.zeros_like(old), weights, scores)
    fields, _ = ppo.learn(config(rl__kl_coef=0.3, rl__gae_lambda=1.0), found)
    for row in range(ROWS):
        low, high = start[row] - 1, end[row] - 1
        costs = -0.3 * (old - reference)[row, low:high]
        want = [costs[t:].sum() + scores[row] for t in range(high - low)]
        np.testing.assert_allclose(fields['returns'][row, low:high], want, rtol=1e-4, atol=1e-5)
        assert not np.asarray(fields['returns'][row])[weights[row] == 0].any()


def test_an_answer_is_measured_by_its_siblings():
    scores = np.random.default_rng(3).normal(2, 3, (5, 4)).astype(np.float32)
    theirs = torch.tensor(scores)
    theirs = (theirs - theirs.mean(1, keepdim=True)) / (theirs.std(1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(grpo.relative(scores), theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(grpo.relative(np.full((2, 4), 7.0, np.float32)), 0.0)
    weights = weights_of(*places(np.random.default_rng(4)))
    zeros = np.zeros_like(weights)
    found = policy.Found(zeros, zeros, zeros, weights, np.asarray([1, 1, 1, 1, 0, 1, 2, 3], np.float32))
    fields, metrics = grpo.learn(config(rl__group=4), found)
    assert metrics['groups_alike'] == 0.5
    assert not np.asarray(fields['advantages'][:4]).any()
    chex.assert_shape(fields['advantages'], (ROWS, LENGTH))


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """A model with its parameters and a value head, and the same in `transformers`."""
    from transformers import AutoModelForCausalLM

    model = models.build(models.read_config(LLAMA))
    params = jax.jit(model.init)(jax.random.key(0))
    folder = tmp_path_factory.mktemp('rl') / 'model'
    hf.save(folder, model, params)
    head = {'kernel': jax.random.normal(jax.random.key(1), (32, 1)) * 0.2, 'bias': jnp.full(1, 0.1)}
    return model, params | {value.NAME: head}, AutoModelForCausalLM.from_pretrained(folder)


def make_batch(seed: int = 5) -> dict:
    rng = np.random.default_rng(seed)
    start, end = places(rng)
    weights = weights_of(start, end)
    tokens = rng.integers(1, 64, (ROWS, LENGTH)).astype(np.int32)
    fields = {name: rng.normal(size=(ROWS, LENGTH)).astype(np.float32) * weights for name in ('advantages', 'returns')}
    fields['values'] = rng.normal(0, 0.3, (ROWS, LENGTH)).astype(np.float32) * weights
    # Near what the model says, so that some ratios are clipped and others not.
    for name in ('old', 'reference'):
        fields[name] = (-np.log(64) + rng.normal(0, 0.3, (ROWS, LENGTH))).astype(np.float32) * weights
    return {'tokens': tokens, 'start': start, 'end': end, **fields}


def theirs(task: str, settings, torch_model, head, batch):
    """Loss and metrics in PyTorch, of the definitions, with gradients in the model."""
    t = {name: torch.tensor(array) for name, array in batch.items()}
    mask = torch.tensor(weights_of(batch['start'], batch['end']))
    attends = torch.arange(LENGTH)[None] < t['end'][:, None]
    out = torch_model(input_ids=t['tokens'].long(), attention_mask=attends.long(), output_hidden_states=True)
    logprobs = torch.log_softmax(out.logits[:, :-1] / settings.generate.temperature, -1)
    logprobs = logprobs.gather(-1, t['tokens'][:, 1:, None].long())[..., 0]
    logprobs = torch.nn.functional.pad(logprobs, (0, 1)) * mask
    ratio, rl = torch.exp(logprobs - t['old']), settings.rl
    clipped = torch.clamp(ratio, 1 - rl.clip, 1 + rl.clip)
    losses = torch.maximum(-t['advantages'] * ratio, -t['advantages'] * clipped)
    if task == 'grpo':
        away = torch.exp(t['reference'] - logprobs) - (t['reference'] - logprobs) - 1
        each = ((losses + rl.kl_coef * away) * mask).sum(1) / mask.sum(1)
        return each.mean()
    values = (out.hidden_states[-1] @ head['kernel'] + head['bias'])[..., 0] * mask
    near = t['values'] + torch.clamp(values - t['values'], -rl.value_clip, rl.value_clip)
    off = 0.5 * torch.maximum((values - t['returns']) ** 2, (near - t['returns']) ** 2)
    return ((losses + rl.value_coef * off) * mask).sum() / mask.sum()


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('task', ['ppo', 'grpo'])
def test_loss_and_gradients_are_pytorchs(both, task, temperature):
    model, params, torch_model = both
    algorithm = {'ppo': ppo, 'grpo': grpo}[task]
    recipe, batch = config(generate__temperature=temperature, rl__value_coef=0.5), make_batch()

    def mean(params):
        total, count, _ = algorithm.loss(recipe, model, params, batch, None)
        return total / count

    loss, gradients = jax.jit(jax.value_and_grad(mean))(params)
    torch_model.zero_grad()
    head = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in params[value.NAME].items()}
    expected = theirs(task, recipe, torch_model, head, batch)
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
            np.testing.assert_allclose(gradients[value.NAME][name], want.grad, rtol=1e-4, atol=1e-6)
    else:
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients[value.NAME]))


@pytest.mark.parametrize('task', ['ppo', 'grpo'])
def test_sums_over_parts_of_a_batch_are_those_of_the_whole(both, task):
    model, params, _ = both
    algorithm = {'ppo': ppo, 'grpo': grpo}[task]
    recipe, batch = config(), make_batch()
    loss = jax.jit(lambda batch: algorithm.loss(recipe, model, params, batch, None))
    halves = [loss({name: x[half::2] for name, x in batch.items()}) for half in (0, 1)]
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *halves), loss(batch), rtol=1e-4, atol=1e-5)


def test_nothing_is_clipped_and_nothing_has_moved_before_the_first_update(both):
    model, params, _ = both
    recipe, batch = config(), make_batch()
    old, values, weights = policy.read(recipe, model, params, batch)
    batch |= {'old': old, 'values': values, 'returns': values, 'reference': old}
    _, count, sums = ppo.loss(recipe, model, params, batch, None)
    assert sums['clip_fraction'] == sums['value_clip_fraction'] == sums['value_loss'] == 0
    np.testing.assert_allclose(sums['approx_kl'], 0, atol=1e-5)
    np.testing.assert_allclose(sums['policy_loss'], -(batch['advantages'] * weights).sum(), rtol=1e-4)
    assert count == weights.sum()
    assert grpo.loss(recipe, model, params, batch, None)[2]['reference_kl'] == 0


def test_a_tempered_head_divides_the_logits():
    head = Head(jnp.ones((4, 6)), jnp.arange(6.0), scale=0.5)
    hidden = jnp.linspace(0, 1, 4)

    def logits(head):
        return head.scale * hidden @ head.kernel + head.bias

    np.testing.assert_allclose(logits(policy.tempered(head, 0.7)), logits(head) / 0.7, rtol=1e-6)
    assert policy.tempered(head, 1.0) is head


def test_a_new_value_head_says_nothing(both):
    model, params, _ = both
    fresh = value.with_value(value.policy(params), model)
    assert set(fresh) - set(value.policy(fresh)) == {value.NAME}
    assert not np.asarray(value.values(fresh, jnp.ones((2, 3, 32)))).any()
