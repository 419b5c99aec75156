"""State in the host's memory: an update has the bits of one on the device, large stacks come and go by layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.optim import adam8bit, offload
from jaxtune.optim.optimizers import make_optimizer
from jaxtune.optim.stochastic_rounding import apply_updates
from jaxtune.parallel import make_mesh, match_rules, shardings, state_specs
from jaxtune.recipe import recipes

LAYERS = 3


def parameters(dtype):
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return (0.1 * jax.random.normal(next(keys), shape)).astype(dtype)

    mlp = {'up_proj': {'kernel': normal(LAYERS, 64, 128)}, 'down_proj': {'kernel': normal(LAYERS, 128, 64)}}
    return {
        'embed_tokens': {'embedding': normal(96, 64)},
        'layers': {'mlp': mlp, 'norm': {'scale': normal(LAYERS, 64)}},
        'norm': {'scale': normal(64)},
    }


def results(name, dtype):
    """Parameters and state after some updates with the state on the device, and in the host's memory."""
    config = recipes.defaults()
    recipes.apply_overrides(config, {'optimizer.name': name, 'optimizer.warmup_steps': 0})
    rule = make_optimizer(config.optimizer, 100)
    mesh = make_mesh({'fsdp': 2}, jax.devices()[:2])
    shapes = jax.eval_shape(lambda: parameters(dtype))
    specs = match_rules(shapes, mesh)
    state_shapes = jax.eval_shape(rule.init, shapes)
    placed = shardings(specs, mesh)
    on_device = shardings(state_specs(state_shapes, shapes, specs), mesh)
    on_host = offload.on_host(state_shapes, on_device)

    def factor(grads):
        squares = [jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in jax.tree.leaves(grads)]
        return 1 / jnp.sqrt(sum(squares))

    def whole(params, state, grads, key):
        updates, state = rule.update(offload.scaled(grads, factor(grads)), state, params)
        return apply_updates(params, updates, key), state

    def by_layers(params, state, grads, key):
        return offload.update_layers(rule, grads, factor(grads), state, params, key, (placed, on_host))

    with jax.set_mesh(mesh):
        for function, places in ((whole, on_device), (by_layers, on_host)):
            params = jax.device_put(parameters(dtype), placed)
            state = jax.jit(rule.init, out_shardings=places)(params)
            update = jax.jit(function, donate_argnums=(0, 1), out_shardings=(placed, places))
            for i in range(3):
                grads = jax.tree.map(lambda x, i=i: jnp.sin(37 * x + i).astype(x.dtype), params)
                params, state = update(params, state, grads, jax.random.key(i))
            yield jax.tree.map(np.asarray, (params, state)), state


@pytest.mark.parametrize(
    ('name', 'dtype'),
    [
        ('adamw', jnp.float32),
        ('adamw', jnp.bfloat16),
        ('adamw8bit', jnp.float32),
        pytest.param('adafactor', jnp.float32, marks=pytest.mark.exhaustive),
        pytest.param('lion', jnp.float32, marks=pytest.mark.exhaustive),
        pytest.param('muon', jnp.float32, marks=pytest.mark.exhaustive),
        pytest.param('sgd', jnp.bfloat16, marks=pytest.mark.exhaustive),
    ],
)
def test_an_update_has_the_bits_of_one_on_the_device(monkeypatch, name, dtype):
    # All stacks are large.
    monkeypatch.setattr(offload, 'LARGE', 0)
    monkeypatch.setattr(adam8bit, 'LARGE', 0)
    looped = []
    monkeypatch.setattr(
        offload._Update,
        'stack',
        lambda self, params, old=offload._Update.stack: looped.extend(params) or old(self, params),
    )
    (expected, _), (got, state) = results(name, dtype)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert ('layers/mlp/up_proj/kernel' in looped) == (name != 'adafactor')  # whose state is small
    kinds = {name: leaf.sharding.memory_kind for name, leaf in offload.flat(state).items()}
    if name == 'adamw8bit':  # codes stay on the device where they are few, and scales do
        assert set(kinds.values()) == {'device', 'pinned_host'}
    else:
        assert set(kinds.values()) == {'pinned_host'}


def test_eight_bit_codes_that_cannot_be_cut_stay_on_the_device():
    mesh = make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    kernel = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp', 'tensor'))
    stack = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp', 'tensor'))
    codes = jax.ShapeDtypeStruct((2048, 1024), jnp.uint8)
    stacked = jax.ShapeDtypeStruct((8, 2048, 1024), jnp.uint8)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))
    wide = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
    found = offload.on_host([codes, codes, codes, stacked, wide], [kernel, rows, columns, stack, kernel])
    kinds = ['device', 'device', 'pinned_host', 'pinned_host', 'pinned_host']
    assert [place.memory_kind for place in found] == kinds
