"""Only the places that are scored go through the vocabulary: the same numbers and gradients, on any mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import models
from jaxtune.models import value_head
from jaxtune.parallel import AXES, make_mesh, place_all
from jaxtune.recipe import recipes
from jaxtune.rl import policy
from jaxtune.rl.layout import few, row_lengths, scored_count, scored_places
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.rollouts import Rollouts
from jaxtune.tasks import specs

LLAMA = {
    'model_type': 'llama',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_hidden_layers': 1,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
}
ROWS, LENGTH, WIDTH = 8, 32, 7


def answers(rng, rows=ROWS, length=LENGTH, width=WIDTH) -> Rollouts:
    start = rng.integers(1, length - width + 1, rows).astype(np.int32)
    sizes = rng.integers(1, width + 1, rows).astype(np.int32)
    sizes[:2] = 1, width
    end = start + sizes
    tokens = rng.integers(1, 64, (rows, length)).astype(np.int32) * (np.arange(length) < end[:, None])
    empty = np.zeros((rows, width), np.float32)
    return Rollouts((None,) * rows, ('',) * rows, tokens, start, end, np.ones(rows, bool), empty)


@functools.cache
def model_and_params():
    model = models.build(models.read_config(LLAMA))
    params = jax.jit(model.init)(jax.random.key(0))
    head = {'kernel': jax.random.normal(jax.random.key(1), (32, 1)), 'bias': jnp.full(1, 0.1)}
    return model, params | {value_head.NAME: head}


def batch_of(seed: int, parts: int = 1) -> dict[str, np.ndarray]:
    made = answers(np.random.default_rng(seed))
    rows = RolloutPacker(made, np.arange(ROWS), LENGTH, False, ROWS, parts)
    numbers = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(np.float32)
    names = ('old', 'reference', 'values', 'advantages', 'returns')
    return rows.fields() | {name: rows.spread(numbers + i) for i, name in enumerate(names)}


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (8, 1, 1, 1), (1, 2, 2, 2), (2, 1, 1, 4)], ids=str)
def test_the_scored_places_alone_give_the_same_numbers_and_gradients(sizes):
    model, params = model_and_params()
    config = recipes.defaults()
    keys = {'task': 'ppo', 'data.seq_len': LENGTH, 'generate.max_new_tokens': WIDTH, 'rl.entropy_coef': 0.1}
    recipes.apply_overrides(config, keys | {'rl.kl_in': 'loss', 'generate.temperature': 0.7})
    algorithm, batch = specs.bound_algorithm(config), batch_of(3, sizes[3])
    assert batch['places'].shape[1] < LENGTH // 2

    def loss(params, batch):
        total, count, sums = algorithm.loss(model, params, batch, None)
        return total / count, sums

    mesh = make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[: int(np.prod(sizes))])
    everywhere = {name: x for name, x in batch.items() if name != 'places'}
    (whole, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, everywhere)
    with jax.set_mesh(mesh):
        assert {name: x.shape[1:] for name, x in batch.items()} == {
            name: x.shape for name, x in algorithm.batch_spec().items()
        }
        found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, place_all(batch, mesh))
    host = functools.partial(jax.tree.map, np.asarray)
    chex.assert_trees_all_close(host(found), host(((whole, sums), gradients)), rtol=2e-4, atol=1e-5)


def test_a_batch_without_places_is_scored_everywhere():
    model, params = model_and_params()
    batch = batch_of(5)
    everywhere = {name: x for name, x in batch.items() if name != 'places'}
    found = policy.per_token_logps(model, params, batch, 1.0)
    chex.assert_trees_all_close(found, policy.per_token_logps(model, params, everywhere, 1.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], policy.per_token_values(model, params, batch), rtol=1e-5, atol=1e-6)
    assert not np.asarray(found[0])[batch['loss_mask'] == 0].any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.sampled_from([24, 48, 256]), parts=st.sampled_from([1, 2, 4]))
def test_places_are_those_of_the_mask(seed, length, parts):
    rng = np.random.default_rng(seed)
    mask = (rng.random((5, length)) < rng.random((5, 1))).astype(np.float32)
    places = scored_places(mask, parts)
    assert places.shape[1] % parts == 0
    assert places.shape[1] <= length
    for row, own in zip(mask, places, strict=True):
        np.testing.assert_array_equal(own[own < length], np.flatnonzero(row))


def test_there_are_few_shapes():
    assert [few(count) for count in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert {scored_count(4096, most) for most in range(4096)} == {256 * n for n in (1, 2, 3, 4, 6, 8, 12, 16)}
    assert row_lengths(96) == [96]
    assert row_lengths(200) == [128, 200]
    assert row_lengths(4096) == [256 * times for times in (1, 2, 3, 4, 6, 8, 12, 16)]
    assert all(size % 3 == 0 for size in row_lengths(3000, 3))


@pytest.mark.parametrize(('longest', 'shape'), [(100, (4, 128)), (150, (4, 384)), (300, (8, 384)), (512, (8, 512))])
def test_rows_are_as_short_as_the_answers_allow(longest, shape):
    """Eight answers, of which the longest with its prompt has so many tokens, and the others nearly."""
    ends = np.full(8, longest - 10, np.int32)
    ends[0] = longest
    if longest == 100:
        ends[:] = 64
    tokens = np.ones((8, 1024), np.int32)
    empty = np.zeros((8, 64), np.float32)
    made = Rollouts((None,) * 8, ('',) * 8, tokens, ends - 8, ends, np.ones(8, bool), empty)
    rows = RolloutPacker(made, np.arange(8), 1024, True, 1)
    assert rows.shape == shape
    fields = rows.fields()
    assert fields['tokens'].shape == rows.shape
    assert fields['loss_mask'].sum() == 64


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize('prompt', [1, 20])
def test_answers_that_share_their_prompt_learn_what_they_do_alone(sizes, prompt):
    """Three groups of unequal answers, of GSPO, whose ratio is a segment's."""
    model, params = model_and_params()
    rng, config = np.random.default_rng(0), recipes.defaults()
    recipes.apply_overrides(config, {'task': 'grpo', 'data.seq_len': LENGTH, 'rl.ratio': 'sequence', 'rl.clip': 0.5})
    algorithm = specs.bound_algorithm(config)
    start = np.full(9, prompt, np.int32)
    end = start + np.asarray([1, 7, 3, 5, 5, 2, 7, 1, 6], np.int32)
    prompts = rng.integers(1, 64, (3, prompt)).repeat(3, axis=0)[:, :prompt]
    tokens = np.concatenate([prompts, rng.integers(1, 64, (9, LENGTH - prompt))], 1).astype(np.int32)
    empty = np.zeros((9, WIDTH), np.float32)
    made = Rollouts((None,) * 9, ('',) * 9, tokens * (np.arange(LENGTH) < end[:, None]), start, end, end > 0, empty)
    mask = np.arange(WIDTH) < (end - start)[:, None]
    numbers = {name: rng.normal(-4, 0.3, mask.shape) * mask for name in ('old', 'reference')}
    numbers['advantages'] = rng.normal(size=(9, 1)) * mask
    chosen = rng.permutation(9)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[: int(np.prod(sizes))])

    def loss(params, batch):
        total, count, sums = algorithm.loss(model, params, batch, None)
        return total / count, sums

    found, places = [], []
    for share in (False, True):
        rows = RolloutPacker(made, chosen, LENGTH, True, sizes[0], sizes[3], share)
        batch = rows.fields() | {name: rows.spread(x[chosen]) for name, x in numbers.items()}
        assert rows.gather(rows.spread(numbers['old'][chosen])) == pytest.approx(numbers['old'][chosen], abs=1e-6)
        places.append((batch['segment_ids'] != 0).sum())
        with jax.set_mesh(mesh):
            outcome = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, place_all(batch, mesh))
            found.append(jax.tree.map(np.asarray, outcome))
    assert (places[1] < places[0]) == (prompt > 1)
    assert (batch['segment_ids'] < 0).any() == (prompt > 1)
    chex.assert_trees_all_close(found[1], found[0], rtol=2e-4, atol=1e-5)
