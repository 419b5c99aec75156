"""What memory and work the methods save: eight-bit and offloaded optimizer state, no gradients of frozen kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import TARGETS, batch_of, build, one_device, settings, tuned

from jaxtune import models
from jaxtune.methods import apply
from jaxtune.optim.adam8bit import encode, wide
from jaxtune.parallel import place
from jaxtune.tasks import specs
from jaxtune.training.program import make_program
from jaxtune.weights import tree

# For a step that runs hundreds of times: the suite compiles quickly what mostly runs once.
FAST_CODE = {'xla_backend_optimization_level': 1}


def program_of(config, model, params):
    mesh = one_device()
    _, params = tuned(config, model, params, mesh)
    trainable, frozen = apply.partition(specs.method(config).method, params, frozenset())
    keys = {'optimizer': config.optimizer, 'batch_size': config.train.batch_size, 'method': specs.method(config)}
    return make_program(mesh, model, trainable, TARGETS, steps=300, **keys), trainable, frozen


def test_eight_bit_state_follows_adamw_at_a_quarter_of_the_bytes():
    fields = {
        'model_type': 'llama', 'vocab_size': 96, 'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2,
        'num_attention_heads': 4, 'max_position_embeddings': 64,
    }  # fmt: skip
    model = models.build(models.read_config(fields))
    params = jax.jit(model.init)(jax.random.key(0))
    # Next tokens are those of a noisy rule, anew in every update: what is learnt is no memory of a batch.
    rng = np.random.default_rng(0)
    rule = rng.permutation(96)
    losses, sizes = {}, {}
    for name in ('adamw', 'adamw8bit'):
        config = settings(**{'method.name': 'full', 'optimizer.name': name, 'optimizer.lr': 2e-3})
        program, trainable, frozen = program_of(config, model, params)
        state, found = program.init_state(trainable), []
        shape = jax.ShapeDtypeStruct((8, 16), np.int32)
        lowered = program.train_step(1).lower(state, frozen, {'tokens': shape, 'targets': shape})
        step = lowered.compile(FAST_CODE)
        sizes[name] = tree.nbytes(state['opt_state'])
        draw = np.random.default_rng(1)
        for _ in range(200):
            tokens = draw.integers(0, 96, shape.shape).astype(np.int32)
            targets = np.where(draw.random(tokens.shape) < 0.2, draw.integers(0, 96, tokens.shape), rule[tokens])
            state, metrics = step(state, frozen, {'tokens': tokens, 'targets': targets.astype(np.int32)})
            found.append(float(metrics['loss']))
        losses[name] = np.asarray(found).reshape(-1, 10).mean(1)
    assert losses['adamw'][-1] < 0.6 * losses['adamw'][0]
    np.testing.assert_allclose(losses['adamw8bit'], losses['adamw'], rtol=0.01)
    assert sizes['adamw8bit'] < 0.27 * sizes['adamw']


@pytest.mark.parametrize('shape', [(3, 64, 512), (2, 300, 16), (5000,)])
def test_moments_keep_their_shape_and_sign(shape):
    value = jax.random.normal(jax.random.key(0), shape)
    for signed in (True, False):
        exact = value if signed else jnp.square(value)
        moment = encode(exact, signed)
        assert moment.codes.shape == shape
        assert moment.codes.dtype == jnp.uint8
        assert float(jnp.abs(wide(moment, signed) - exact).max()) < 0.01 * float(jnp.abs(exact).max())
        assert not signed or bool((jnp.sign(wide(moment, signed)) * jnp.sign(exact) >= 0).all())
    assert bool((wide(encode(exact, False), False) > 0).all())


def test_offloaded_state_gives_the_same_bits():
    model, params = build('decoder')
    results = []
    for offload in (False, True):
        config = settings(**{'optimizer.offload': offload})
        program, trainable, frozen = program_of(config, model, params)
        with jax.set_mesh(program.mesh):
            state, step = program.init_state(trainable), program.train_step(1)
            batch = place(lambda low, high: {k: v[low:high] for k, v in batch_of('decoder').items()}, 8, program.mesh)
            for _ in range(5):
                state, _ = step(state, frozen, batch)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state['opt_state'])}
        assert kinds == ({'pinned_host'} if offload else {'device'})
        results.append(jax.tree.map(np.asarray, state['trainable']))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_frozen_kernels_get_no_gradient():
    """The compiled program has no product of a kernel's shape, where full tuning has one a kernel."""
    model, params = build('decoder')
    counts = {}
    for name in ('full', 'lora', 'qlora'):
        config = settings(**{'method.name': name})
        program, trainable, frozen = program_of(config, model, params)
        with jax.set_mesh(program.mesh):
            # 64 tokens: no activation has a kernel's shape.
            batch = {k: jnp.asarray(v[:4]) for k, v in batch_of('decoder').items()}
            text = program.train_step(1).lower(program.init_state(trainable), frozen, batch).compile().as_text()
        counts[name] = len(re.findall(r'= \(?f32\[(?:128,256|256,128)\]\S*(?:, \S+)? (?:dot|custom-call)\(', text))
    assert counts['full'] >= 3
    assert counts['lora'] == counts['qlora'] == 0
