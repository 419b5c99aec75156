"""Products in eight bits: within the bounds of their formats, for every kind of leaf, and good enough to train by."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import cost, models
from jaxtune.cost import hlo, work
from jaxtune.errors import UserError
from jaxtune.parallel import make_mesh
from jaxtune.parallel.topology import topology_devices
from jaxtune.recipe import recipes
from jaxtune.weights import Codec, LoRA, dot, low_precision, materialise

FP8 = {
    'e4m3': (2.0**-4, 2.0**-10, 448.0),
    'e5m2': (2.0**-3, 2.0**-17, 57344.0),
}  # half a last bit, half the least, most
SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([1, 8, 63, 200]), st.sampled_from([1, 16, 50]))


def drawn(shape, seed, size):
    return np.asarray(size * np.random.default_rng(seed).standard_t(3, shape), np.float32)


def fp8_error(x, kind):
    """The most that rounding with the tensor's scale, a power of two, moves each number by."""
    half, least, most = FP8[kind]
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / most))
    return np.maximum(np.abs(x) * half, scale * least)


def product_bound(x, x_error, w, w_error):
    size = np.abs(x) @ np.abs(w)
    return np.abs(x) @ w_error + x_error @ np.abs(w) + x_error @ w_error + 1e-5 * size


@functools.partial(jax.jit, static_argnums=3)
def product_and_gradients(x, w, d_y, kind):
    y, pull = jax.vjp(lambda x, w: dot(x, w, matmul=kind), x, w)
    return y, *pull(d_y)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(SHAPES, st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 30.0]))
def test_fp8_is_within_its_formats_bounds(shape, seed, size):
    tokens, inputs, outputs = shape
    x, w, d_y = (
        drawn((tokens, inputs), seed, size),
        drawn((inputs, outputs), seed + 1, 0.02),
        drawn((tokens, outputs), seed + 2, size),
    )
    y, d_x, d_w = (np.asarray(a, np.float64) for a in product_and_gradients(x, w, d_y, 'fp8'))
    x, w, d_y = (a.astype(np.float64) for a in (x, w, d_y))
    x_error, w_error, d_error = fp8_error(x, 'e4m3'), fp8_error(w, 'e4m3'), fp8_error(d_y, 'e5m2')
    assert (np.abs(y - x @ w) <= product_bound(x, x_error, w, w_error)).all()
    assert (np.abs(d_x - d_y @ w.T) <= product_bound(d_y, d_error, w.T, w_error.T)).all()
    assert (np.abs(d_w - x.T @ d_y) <= product_bound(x.T, x_error.T, d_y, d_error)).all()


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(SHAPES, st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 30.0]))
def test_int8_is_within_its_scales_and_its_gradient_is_the_products(shape, seed, size):
    tokens, inputs, outputs = shape
    x, w, d_y = (
        drawn((tokens, inputs), seed, size),
        drawn((inputs, outputs), seed + 1, 0.02),
        drawn((tokens, outputs), seed + 2, size),
    )
    y, d_x, d_w = (np.asarray(a, np.float64) for a in product_and_gradients(x, w, d_y, 'int8'))
    x, w, d_y = (a.astype(np.float64) for a in (x, w, d_y))
    x_error = np.abs(x).max(1, keepdims=True) / 254 * np.ones_like(x) * (1 + 1e-4)
    w_error = np.abs(w).max(0, keepdims=True) / 254 * np.ones_like(w) * (1 + 1e-4)
    assert (np.abs(y - x @ w) <= product_bound(x, x_error, w, w_error)).all()
    np.testing.assert_allclose(d_x, d_y @ w.T, atol=1e-5 * (np.abs(d_y) @ np.abs(w.T)).max())
    np.testing.assert_allclose(d_w, x.T @ d_y, atol=1e-5 * (np.abs(x.T) @ np.abs(d_y)).max())


def test_int8_on_a_cpu_adds_up_integers_exactly(monkeypatch):
    x, w = jnp.asarray(drawn((8, 200), 0, 1.0)), jnp.asarray(drawn((200, 16), 1, 1.0))
    found = low_precision.low_dot(x, w, 'int8')
    monkeypatch.setattr(low_precision, '_EXACT', 0)
    np.testing.assert_array_equal(low_precision.low_dot(x, w, 'int8'), found)


@pytest.mark.parametrize('kind', low_precision.KINDS)
def test_zeros_and_what_is_not_finite(kind):
    w = jnp.ones((8, 4))
    assert not low_precision.low_dot(jnp.zeros((2, 8)), w, kind).any()
    assert not jnp.isfinite(low_precision.low_dot(jnp.full((2, 8), jnp.nan), w, kind)).any()
    assert not jnp.isfinite(low_precision.low_dot(jnp.full((2, 8), jnp.inf), w, kind)).any()


@pytest.mark.parametrize('kind', low_precision.KINDS)
@pytest.mark.parametrize('quantised', [False, True], ids=['plain', 'nf4'])
def test_a_frozen_base_under_lora(kind, quantised):
    """The base alone is multiplied in eight bits; NF4 as what it stands for."""
    kernel = drawn((64, 32), 0, 0.1)
    base = Codec().encode_kernel(jnp.asarray(kernel)) if quantised else jnp.asarray(kernel)
    plain = materialise(base)
    a, b = jnp.asarray(drawn((64, 4), 1, 0.1)), jnp.asarray(drawn((4, 32), 2, 0.1))
    x, d_y = jnp.asarray(drawn((3, 5, 64), 3, 1.0)), jnp.asarray(drawn((3, 5, 32), 4, 1.0))

    def tuned(x, a, b):
        return dot(x, LoRA(base, a, b, jnp.float32(2)), matmul=kind)

    def expected(x, a, b):
        return low_precision.low_dot(x, plain, kind) + dot(dot(x, a), b) * 2

    found, pull = jax.vjp(tuned, x, a, b)
    wanted, pull_wanted = jax.vjp(expected, x, a, b)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for mine, theirs in zip(pull(d_y), pull_wanted(d_y), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize('kind', low_precision.KINDS)
def test_a_mesh_and_activation_checkpointing_change_nothing(kind):
    """A scan over layers whose kernels and rows are divided; scales are of whole tensors, rows and columns."""
    x, w = jnp.asarray(drawn((8, 64), 0, 1.0)), jnp.asarray(drawn((3, 64, 64), 1, 0.1))

    def loss(x, w, wrap=lambda f: f):
        step = wrap(lambda x, kernel: (jnp.tanh(dot(x, kernel, matmul=kind)), None))
        return jnp.square(jax.lax.scan(step, x, w)[0]).sum()

    gradient = jax.grad(loss, (0, 1))
    expected = jax.jit(gradient)(x, w)
    for policy in (None, jax.checkpoint_policies.save_only_these_names('product')):
        wrap = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        found = jax.jit(functools.partial(gradient, wrap=wrap))(x, w)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
    places = (NamedSharding(mesh, P('fsdp')), NamedSharding(mesh, P(None, 'fsdp', 'tensor')))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient, in_shardings=places)(*jax.device_put((x, w), places))
    # A sum in another order may round to the next number of eight bits.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.05, rtol=0.05), found, expected)


FIELDS = {
    'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'max_position_embeddings': 32,
}  # fmt: skip


def train(matmul, updates=200):
    """Losses of a small model on a language of which each token depends on the one before."""
    fields = models.read_config(FIELDS)
    model = models.build(fields, compute_dtype='bfloat16', matmul=matmul)
    optimizer = optax.adamw(3e-3)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)) * 2, jnp.float32)

    def batch(key):
        def step(token, key):
            token = jax.random.categorical(key, table[token])
            return token, token

        first, rest = jax.random.split(key)
        tokens = jax.random.randint(first, (8,), 0, 64)
        return jax.lax.scan(step, tokens, jax.random.split(rest, 16))[1].T

    def loss(params, tokens):
        logits = model.logits(params, model.apply(params, {'tokens': tokens}).hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    def update(carry, key):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch(key))
        changes, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, changes), state), value

    @jax.jit
    def run(key):
        params = model.init(key)
        return jax.lax.scan(update, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), updates))[1]

    return np.asarray(run(jax.random.key(0))), model.kernels


@functools.cache
def in_bfloat16():
    return train('')[0]


@pytest.mark.parametrize('kind', low_precision.KINDS)
def test_training_is_as_good_as_in_bfloat16(kind):
    losses, kernels = train(kind)
    assert list(kernels.products) == [kind]
    assert kernels.products[kind].startswith('emulated: cpu')
    expected, final = in_bfloat16()[-20:].mean(), losses[-20:].mean()
    assert expected < 0.75 * in_bfloat16()[0]
    assert final == pytest.approx(expected, rel=0.01)
    assert not np.array_equal(losses, in_bfloat16())


def test_a_recipe_names_the_kinds_that_there_are():
    config = recipes.defaults()
    recipes.apply_overrides(config, {'model.matmul': 'int8'})
    with pytest.raises(UserError, match=r'model\.matmul'):
        recipes.apply_overrides(config, {'model.matmul': 'fp4'})


def installed(name) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(
    ('topology', 'kind', 'numbers', 'plugin'),
    [
        ('cuda:h100x1', 'fp8', 'f8', 'jax_plugins.xla_cuda13'),
        ('cuda:h100x1', 'int8', 's8', 'jax_plugins.xla_cuda13'),
        ('v5e:2x2', 'int8', 's8', 'libtpu'),
    ],
)
def test_hardware_that_is_not_here_multiplies_eight_bits(topology, kind, numbers, plugin, monkeypatch):
    if not installed(plugin):
        pytest.skip(f'needs {plugin}, which compiles for it')
    jax.devices()
    monkeypatch.delenv('XLA_FLAGS')  # of the CPU: libtpu reads them too, and ends the process over an unknown one
    device = topology_devices(topology)[0]
    mesh = make_mesh({}, [device])
    rows, width, wide = 512, 1024, 2048
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P()))
        for shape in ((rows, width), (width, wide), (rows, wide))
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert low_precision.choice(kind) == (kind, '')
        text = product_and_gradients.lower(*args, kind).compile().as_text()
    assert text
    module, flops = hlo.parse(text), {}
    for one in module.computations[module.entry].values():
        for dtype, count in work.products(module, module.computations[module.entry], one).items():
            flops[dtype] = flops.get(dtype, 0.0) + count
    eight = sum(count for dtype, count in flops.items() if dtype.startswith(numbers))
    assert eight == 2 * rows * width * wide * (3 if kind == 'fp8' else 1)
    chip = cost.chip_of(device)
    assert chip
    assert all(
        2 * chip.product_seconds(1.0, dtype) == chip.product_seconds(1.0, 'bf16')
        for dtype in flops
        if dtype.startswith(numbers)
    )
