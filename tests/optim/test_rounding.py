"""Parameters in bfloat16: rounded stochastically, the same on any mesh, and they learn as float32 ones do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import models
from jaxtune.objectives.cross_entropy import cross_entropy
from jaxtune.optim.optimizers import make_optimizer, schedule
from jaxtune.optim.stochastic_rounding import apply_updates, to_bfloat16
from jaxtune.parallel import make_mesh
from jaxtune.recipe import recipes
from jaxtune.training import step
from jaxtune.weights import lookup

NUMBER = jnp.uint32(12345)


def test_a_number_becomes_one_of_its_neighbours_and_is_right_on_average():
    gap = 2.0**-7  # of bfloat16 between 1 and 2
    for share in (0.0, 0.1, 0.5, 0.97):
        for sign in (1.0, -1.0):
            value = jnp.full((64, 4096), sign * (1 + share * gap), jnp.float32)
            rounded = np.asarray(jax.jit(to_bfloat16)(value, NUMBER), np.float32)
            assert set(np.unique(sign * rounded)) <= {1.0, 1.0 + gap}
            assert (sign * rounded > 1).mean() == pytest.approx(share, abs=0.005)  # 5 standard deviations


def test_what_bfloat16_can_hold_stays():
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.bfloat16)
    rounded = to_bfloat16(every.astype(jnp.float32), NUMBER)
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.asarray(every, np.float32))


def test_bits_are_of_the_update_the_leaf_and_the_place_alike_on_any_mesh():
    params = {
        'a': {'kernel': jnp.ones((4, 64, 32), jnp.bfloat16)},
        'b': {'kernel': jnp.ones((4, 64, 32), jnp.bfloat16)},
    }
    updates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0**-8), params)
    add = jax.jit(apply_updates)
    moved = jax.tree.map(np.asarray, add(params, updates, jax.random.key(1)))
    for sizes, spec in (((1, 8, 1, 1), P(None, 'fsdp')), ((2, 2, 2, 1), P(None, 'tensor', 'fsdp'))):
        mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=True)))
        placed = jax.device_put((params, updates), NamedSharding(mesh, spec))
        jax.tree.map(np.testing.assert_array_equal, add(*placed, jax.random.key(1)), moved)
    other = add(params, updates, jax.random.key(2))
    ups = [
        np.asarray(leaf, np.float32) > 1 for leaf in (moved['a']['kernel'], moved['b']['kernel'], other['a']['kernel'])
    ]
    for i in range(3):
        assert ups[i].mean() == pytest.approx(0.5, abs=0.03)
        assert (ups[i] == ups[i - 1]).mean() == pytest.approx(0.5, abs=0.03)
    layers, rows = ups[0][0] == ups[0][1], ups[0][:, 0] == ups[0][:, 1]
    assert layers.mean() == pytest.approx(0.5, abs=0.06)
    assert rows.mean() == pytest.approx(0.5, abs=0.2)


def test_a_frequent_token_s_gradient_is_added_up_in_float32():
    table, ids = jnp.ones((8, 4), jnp.bfloat16), jnp.zeros((1, 4096), jnp.int32)
    gradient = jax.grad(lambda table: lookup(table, ids, jnp.dtype('float32')).sum())(table)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32)[:, 0], [4096.0, *[0.0] * 7])


FIELDS = {
    'model_type': 'qwen2', 'vocab_size': 128, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 64,
}  # fmt: skip


@functools.cache
def start():
    model = models.build(models.read_config(FIELDS))
    return jax.jit(model.init)(jax.random.key(0))


@functools.cache
def trained(dtype, steps=150, *, name='adamw', accumulate=1, lr=1e-3):
    """Losses of updates on a noisy rule of next tokens, and the state."""
    model = models.build(models.read_config(FIELDS), param_dtype=dtype)
    params = jax.tree.map(lambda leaf, shape: jnp.array(leaf, shape.dtype), start(), model.shapes)
    frozen = jax.tree.map(lambda leaf: None, params)
    config = recipes.defaults()
    config.optimizer.name, config.optimizer.lr = name, lr
    optimizer = make_optimizer(config.optimizer, steps)

    def loss(params, batch, rng):
        hidden = model.apply(params, {'tokens': batch['tokens']}).hidden
        weights = jnp.ones(batch['targets'].shape, jnp.float32)
        return cross_entropy(hidden, model.head(params), batch['targets'], weights)[0], weights.sum(), {}

    update = step.make_train_step(
        loss, optimizer, schedule(config.optimizer, steps), seed=0, accumulate=accumulate, clip_norm=1.0
    )
    update = jax.jit(update, donate_argnums=0)
    state, losses = step.init_state(params, optimizer), []
    draw, rule = np.random.default_rng(1), np.random.default_rng(0).permutation(128)
    for _ in range(steps):
        tokens = draw.integers(0, 128, (8, 32)).astype(np.int32)
        targets = np.where(draw.random(tokens.shape) < 0.1, draw.integers(0, 128, tokens.shape), rule[tokens])
        state, metrics = update(state, frozen, {'tokens': tokens, 'targets': targets.astype(np.int32)})
        losses.append(metrics['loss'])
    return np.asarray(losses), state


@pytest.mark.parametrize(
    'settings',
    [{}, {'lr': 1e-4}, pytest.param({'name': 'adamw8bit', 'accumulate': 4}, marks=pytest.mark.exhaustive)],
)
def test_bfloat16_learns_as_float32_does(settings):
    wide, _ = trained('float32', **settings)
    narrow, state = trained('bfloat16', **settings)
    assert wide[-20:].mean() < 0.95 * wide[0]
    assert narrow[-20:].mean() == pytest.approx(wide[-20:].mean(), rel=0.01)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state['trainable']):
        narrow_leaf = jax.tree_util.keystr(path).endswith(("'kernel']", "'embedding']"))
        assert leaf.dtype == (jnp.bfloat16 if narrow_leaf else jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state['opt_state'])} <= {
        jnp.dtype(name) for name in ('float32', 'int32', 'uint8')
    }
    norms = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state['trainable']['norm'], start()['norm']))
    assert float(norms) > 0


def test_an_update_that_is_seen_no_more_than_its_neighbour_is_rounded_away_to_the_nearest():
    """What the tests above are for: the same run with sums rounded to the nearest learns a quarter as much."""
    with pytest.MonkeyPatch.context() as patch:
        nearest = lambda params, updates, key: optax.apply_updates(params, updates)  # noqa: E731
        patch.setattr(step, 'apply_updates', nearest)
        stuck, _ = trained.__wrapped__('bfloat16', lr=1e-4)
    wide, _ = trained('float32', lr=1e-4)
    assert stuck[-20:].mean() > 1.02 * wide[-20:].mean()
