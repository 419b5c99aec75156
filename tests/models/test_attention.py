"""Attention against the plain formula: values, gradients, meshes, kernels, memory."""

import functools
import importlib
import math
import re
from unittest import mock

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.errors import UserError
from jaxtune.models import flash, rope, zigzag
from jaxtune.models.attention import KernelLog, attention
from jaxtune.models.blockwise import Pattern, Places, blockwise
from jaxtune.models.flash_triton import triton
from jaxtune.models.splash_blocks import Blocks
from jaxtune.parallel import make_mesh

attention_module = importlib.import_module('jaxtune.models.attention')
blockwise_module = importlib.import_module('jaxtune.models.blockwise')


def plain(q, k, v, places, scale, softcap=None, window=None, causal=True):
    """The formula over all pairs, `[batch, length, heads, head_dim]`."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum('blhd,bshd->bhls', q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = places['q_positions'][:, :, None] - places['k_positions'][:, None]
    seen = (places['q_segment_ids'][:, :, None] == places['k_segment_ids'][:, None]) & (places['q_segment_ids'] > 0)[
        :, :, None
    ]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= abs(distance) < window
    seen = seen[:, None]
    chances = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e9)), 0)
    return jnp.einsum('bhls,bshd->blhd', chances, v)


def packed(rng, batch, length):
    """Positions and segments of rows with a few documents and padding at the end."""
    segment_ids, positions = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for row in range(batch):
        cuts = sorted(rng.integers(1, length + 1, size=3))
        start = 0
        for number, end in enumerate(cuts, 1):
            segment_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            start = end
    return positions, segment_ids


def example(seed, batch, length, heads, kv_heads, width):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, heads, width)).astype(np.float32)
    k, v = (rng.normal(size=(batch, length, kv_heads, width)).astype(np.float32) for _ in 'kv')
    positions, segment_ids = packed(rng, batch, length)
    places = {
        'q_positions': positions,
        'k_positions': positions,
        'q_segment_ids': segment_ids,
        'k_segment_ids': segment_ids,
    }
    return (q, k, v), places, rng.normal(size=q.shape).astype(np.float32)


def angles_of(positions, rotary_dim):
    """Cosine and sine of every position's angles, or None."""
    if not rotary_dim:
        return None
    turned = positions[..., None] * 100.0 ** (-np.arange(rotary_dim // 2) / 4)
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


def turned(x, angles):
    """Pairs of dimensions as complex numbers (Su et al. 2021), multiplied by the angles' own."""
    if angles is None:
        return x
    half = angles[0].shape[-1]
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * (angles[0] + 1j * angles[1])[:, :, None]
    return jnp.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


def with_gradients(function, arrays, cotangent):
    out, pull = jax.vjp(function, *arrays)
    return out, *pull(cotangent)


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * max(1.0, np.abs(np.asarray(b)).max())


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 9),
    batch=st.sampled_from([1, 2, 6]),
    length=st.sampled_from([1, 7, 131, 256, 300]),
    largest=st.sampled_from([2**26, 2**14]),
    groups=st.sampled_from([1, 3]),
    kv_heads=st.sampled_from([1, 2]),
    softcap=st.sampled_from([None, 2.0]),
    window=st.sampled_from([None, 1, 40]),
    traced=st.booleans(),
    causal=st.booleans(),
    rotary_dim=st.sampled_from([0, 4, 8]),
)
def test_equals_the_plain_formula(
    seed, batch, length, largest, groups, kv_heads, softcap, window, traced, causal, rotary_dim
):
    arrays, places, cotangent = example(seed, batch, length, groups * kv_heads, kv_heads, 8)
    angles = angles_of(places['q_positions'], rotary_dim)

    def ours(q, k, v):
        limit = jnp.int32(window) if window is not None and traced else window
        return attention(q, k, v, **places, scale=0.3, angles=angles, softcap=softcap, window=limit, causal=causal)

    def theirs(q, k, v):
        return plain(turned(q, angles), turned(k, angles), v, places, 0.3, softcap, window, causal)

    with mock.patch.object(blockwise_module, '_LARGEST', largest):  # smaller ones cut blocks into parts
        got = with_gradients(jax.jit(ours), arrays, cotangent)
    close(got, with_gradients(jax.jit(theirs), arrays, cotangent))
    padding = places['q_segment_ids'] == 0
    for x in got:
        assert not np.asarray(x)[padding].any()


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('rotary_dim', [4, 8])
def test_rotation_is_the_same_on_every_platform(platform, rotary_dim):
    (q, _, _), places, _ = example(6, 2, 9, 3, 1, 8)
    angles = angles_of(places['q_positions'], rotary_dim)
    with mock.patch.object(rope, 'platform', return_value=platform):
        close([rope.rotate(q, angles)], [turned(q, angles)], 1e-6)
        assert rope.rotate(q.astype(jnp.bfloat16), angles).dtype == jnp.bfloat16


def test_queries_against_a_cache():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(3, 2, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(3, 20, 2, 8)).astype(np.float32) for _ in 'kv')
    places = {
        'q_positions': np.array([[4, 5], [19, 20], [0, 1]], np.int32),
        'k_positions': np.broadcast_to(np.arange(20, dtype=np.int32), (3, 20)),
        'q_segment_ids': np.ones((3, 2), np.int32),
        'k_segment_ids': np.ones((3, 20), np.int32),
    }
    got = attention(q, k, v, **places, scale=0.3, window=6, self_attention=False)
    close([got], [plain(q, k, v, places, 0.3, window=6)])


@pytest.mark.parametrize(
    ('sizes', 'heads', 'kv_heads'),
    [
        ((8, 1, 1, 1), 2, 1),
        ((2, 2, 2, 1), 4, 2),
        ((1, 2, 2, 2), 4, 2),
        ((1, 1, 4, 2), 8, 2),
        ((1, 2, 1, 4), 3, 1),
        ((1, 1, 4, 2), 6, 3),
    ],
    ids=str,
)
def test_any_mesh_gives_the_same(sizes, heads, kv_heads):
    arrays, places, cotangent = example(1, 8, 24, heads, kv_heads, 8)
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=True)), jax.devices()[:8])

    angles = angles_of(places['q_positions'], 8)

    def ours(q, k, v, places, angles, window):
        return attention(q, k, v, **places, scale=0.3, angles=angles, window=window, softcap=4.0)

    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, P(('data', 'fsdp'), 'sequence'))
        placed = jax.device_put((*arrays, cotangent), batch)
        where = jax.device_put((places, angles), batch)

        @jax.jit
        def run(q, k, v, cotangent, where, window):
            return with_gradients(lambda *a: ours(*a, *where, window), (q, k, v), cotangent)

        got = run(*placed, where, jnp.int32(9))

    def theirs(q, k, v):
        return plain(turned(q, angles), turned(k, angles), v, places, 0.3, 4.0, 9)

    reference = with_gradients(theirs, arrays, cotangent)
    close(got, reference)


def test_batch_that_the_mesh_does_not_divide():
    arrays, places, cotangent = example(2, 3, 10, 2, 2, 8)
    mesh = make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1, 'sequence': 1}, jax.devices()[:8])
    reference = with_gradients(lambda *a: plain(*a, places, 0.3), arrays, cotangent)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *a: with_gradients(lambda *b: attention(*b, **places, scale=0.3), a[:3], a[3]))(
            *arrays, cotangent
        )
    close(got, reference)


def test_never_holds_all_scores():
    batch, length, heads = 4, 1024, 4
    x = jax.ShapeDtypeStruct((batch, length, heads, 16), jnp.float32)
    p = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(q, k, v, positions, segment_ids):
        places = {
            'q_positions': positions,
            'k_positions': positions,
            'q_segment_ids': segment_ids,
            'k_segment_ids': segment_ids,
        }
        return attention(q, k, v, **places, scale=0.25).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, p, p).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(',')]) for dims in re.findall(r'(?:f32|pred)\[([\d,]+)\]', text)]
    assert max(sizes) <= heads * length * length // 4


@pytest.mark.parametrize('heads', [8, pytest.param(32, marks=pytest.mark.exhaustive)])
def test_memory_grows_as_the_length_does(heads):
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
        places = dict.fromkeys(('q_positions', 'k_positions', 'q_segment_ids', 'k_segment_ids'))

        def loss(q, k, v, place):
            return attention(q, k, v, **dict.fromkeys(places, place), scale=0.25).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, jax.ShapeDtypeStruct((1, length), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    found = [temporaries(length) for length in (4096, 8192, 16384)]
    assert found[1] <= 2 * found[0]
    assert found[2] <= 2 * found[1]


@pytest.mark.parametrize(
    ('window', 'blocks'),
    [
        (None, None),
        (100, Blocks((128, 128), (128, 128), (128, 256))),
        # A gradient of the queries from each block of keys.
        (100, Blocks((128, 256), (128, 128), None)),
    ],
)
def test_splash_kernel_equals_blockwise(window, blocks):
    (q, k, v), places, cotangent = example(3, 2, 256, 4, 2, 128)
    where = Places(**places)
    pattern = Pattern(scale=0.1, budget=2**21, softcap=5.0, window=window)
    kernel = flash.splash_kernel(q.shape[2], q.shape[1], 1, pattern, interpret=True, blocks=blocks)
    got = with_gradients(lambda *a: flash.splash(*a, where, pattern, None, kernel), (q, k, v), cotangent)
    close(got, with_gradients(lambda *a: blockwise(*a, where, pattern), (q, k, v), cotangent), 2e-5)


@pytest.mark.parametrize(
    ('length', 'sizes', 'kv_heads', 'window', 'zigzags'),
    [
        (512, (2, 1, 2, 2), 1, 100, False),
        (1024, (1, 2, 1, 4), 2, None, True),
        (512, (1, 1, 1, 2), 1, 300, True),
        pytest.param(512, (1, 1, 1, 4), 4, 100, False, marks=pytest.mark.exhaustive),
        pytest.param(512, (2, 1, 2, 2), 1, None, True, marks=pytest.mark.exhaustive),
        pytest.param(2048, (1, 1, 1, 8), 2, None, True, marks=pytest.mark.exhaustive),
    ],
)
def test_splash_divided_over_the_sequence_equals_blockwise(monkeypatch, length, sizes, kv_heads, window, zigzags):
    """In Pallas' interpreter; every device has its own queries, contiguous or in zigzag order, and all keys."""
    (q, k, v), places, cotangent = example(7, 2, length, 4, kv_heads, 16)
    monkeypatch.setattr(zigzag, '_LEAST', 1)
    assert zigzag.pays(length, sizes[-1], window) == zigzags
    call = functools.partial(attention, **places, scale=0.3, window=window)
    expected = with_gradients(call, (q, k, v), cotangent)
    monkeypatch.setattr(flash, 'splash_kernel', functools.partial(flash.splash_kernel, interpret=True))
    monkeypatch.setattr(attention_module, 'platform', lambda: 'tpu')
    mesh = make_mesh(
        dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=True)), jax.devices()[: math.prod(sizes)]
    )
    kernels = KernelLog()
    with jax.set_mesh(mesh):
        got = with_gradients(jax.jit(functools.partial(call, kernels=kernels)), (q, k, v), cotangent)
    assert str(kernels) == 'splash'
    close(got, expected, 2e-5)


@pytest.mark.parametrize(
    ('length', 'heads', 'kv_heads', 'width', 'softcap', 'window', 'traced', 'causal', 'sinks'),
    [
        (192, 4, 2, 16, None, None, False, True, False),
        (100, 3, 1, 24, 5.0, 40, True, True, True),
        (192, 2, 2, 8, None, 40, False, False, False),
        pytest.param(192, 2, 1, 256, None, None, False, True, False, marks=pytest.mark.exhaustive),
        pytest.param(256, 2, 2, 96, None, 70, True, False, True, marks=pytest.mark.exhaustive),
    ],
)
def test_triton_kernel_equals_blockwise(length, heads, kv_heads, width, softcap, window, traced, causal, sinks):
    """In Pallas' interpreter."""
    (q, k, v), places, cotangent = example(8, 2, length, heads, kv_heads, width)
    # In the second row every few tokens are a document of their own, and they come back: no order is assumed.
    ids = places['q_segment_ids'].copy()
    ids[1] = np.random.default_rng(0).integers(0, 7, length).repeat(3)[:length]
    arrays, limit = [q, k, v], None if traced else window
    if sinks:
        arrays.append(np.linspace(-1, 1, heads, dtype=np.float32))
    pattern = Pattern(scale=0.3, budget=2**21, softcap=softcap, window=limit, causal=causal)

    def run(function, **more):
        def call(q, k, v, *sinks):
            at = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
            where = Places(at, at, ids, ids, window=jnp.int32(window) if traced else None)
            return function(q, k, v, where, pattern, *(sinks or [None]), **more)

        return with_gradients(jax.jit(call), arrays, cotangent)

    got = run(triton, interpret=True)
    close(got, run(blockwise))
    assert not np.asarray(got[0])[ids == 0].any()


@pytest.mark.parametrize(
    ('length', 'sizes', 'window'),
    [
        (128, (2, 1, 2, 2), 50),
        (512, (1, 1, 1, 2), None),
        pytest.param(128, (1, 1, 1, 4), 50, marks=pytest.mark.exhaustive),
        pytest.param(1024, (1, 1, 1, 4), 400, marks=pytest.mark.exhaustive),
    ],
)
def test_triton_divided_over_the_sequence_equals_blockwise(monkeypatch, length, sizes, window):
    """In Pallas' interpreter; the longer rows' queries are in zigzag order."""
    arrays, places, cotangent = example(9, 2, length, 4, 2, 16)
    monkeypatch.setattr(zigzag, '_LEAST', 1)
    assert zigzag.pays(length, sizes[-1], window) == (length > 128)
    call = functools.partial(attention, **places, scale=0.3, window=window)
    expected = with_gradients(call, arrays, cotangent)
    monkeypatch.setattr(attention_module, '_choose', lambda *_: ('triton', 'in a test'))
    kernel = functools.partial(triton, interpret=True)
    monkeypatch.setattr(attention_module.flash_triton, 'triton', kernel)
    axes = ('data', 'fsdp', 'tensor', 'sequence')
    mesh = make_mesh(dict(zip(axes, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        got = with_gradients(jax.jit(call), arrays, cotangent)
    close(got, expected)


def test_flash_says_why_it_cannot_run():
    arrays, places, _ = example(4, 1, 8, 2, 2, 8)
    with pytest.raises(UserError, match=r'model\.attention=flash: .*cpu'):
        attention(*arrays, **places, scale=0.3, implementation='flash')
    kernels = KernelLog()
    attention(*arrays, **places, scale=0.3, implementation='auto', kernels=kernels)
    assert kernels.names == ('xla',)
    assert str(kernels) == 'xla'
    kernels.add('splash')
    kernels.add('xla', 'why not')
    assert str(kernels) == 'xla (why not), splash'


@pytest.mark.parametrize(
    ('change', 'kernel', 'reason'),
    [
        ({}, 'splash', ''),
        ({'length': 100, 'keys': 100}, '', 'data.seq_len'),
        ({'window': 'traced'}, '', 'sliding window'),
        ({'platform': 'gpu', 'window': 'traced'}, 'triton', 'packed'),
        ({'platform': 'gpu', 'window': 'traced', 'packed': False}, 'triton', 'sliding window'),
        ({'sequence': 2}, 'splash', ''),
        ({'sequence': 16}, '', 'mesh.sequence=16'),
        ({'platform': 'gpu', 'sequence': 2, 'packed': False}, 'triton', 'mesh.sequence=2'),
        ({'self_attention': False}, '', 'cache'),
        ({'platform': 'gpu'}, 'triton', 'packed'),
        ({'platform': 'gpu', 'packed': False}, 'cudnn', ''),
        ({'platform': 'gpu', 'dtype': jnp.float32}, '', 'model.compute_dtype=float32'),
        ({'platform': 'gpu', 'softcap': 30.0, 'packed': False}, 'triton', 'soft cap'),
        ({'platform': 'gpu', 'head_dim': 256, 'packed': False}, 'triton', 'head_dim'),
        ({'platform': 'gpu', 'head_dim': 512}, '', 'head_dim'),
    ],
)
def test_which_kernel_can_run(monkeypatch, change, kernel, reason):
    monkeypatch.setattr(flash, 'compute_capability', lambda: (9, 0))
    values = {
        'dtype': jnp.bfloat16,
        'length': 1024,
        'keys': 1024,
        'head_dim': 64,
        'softcap': None,
        'window': None,
        'self_attention': True,
        'causal': True,
        'platform': 'tpu',
        'sequence': 1,
    }
    name, why_not = flash.available(flash.Call(**{**values, **change}))
    assert name == kernel
    assert reason in why_not
    assert bool(why_not) == bool(reason)
    if name == 'triton':
        monkeypatch.setattr(flash, 'compute_capability', lambda: (7, 5))
        name, why_not = flash.available(flash.Call(**{**values, **change}))
        assert not name
        assert '7.5' in why_not


def test_remat_that_saves_the_named_values_does_not_run_forward_twice():
    arrays, places, _ = example(5, 2, 16, 2, 2, 8)

    def loss(*arrays):
        return attention(*arrays, **places, scale=0.3).sum()

    from jaxtune.models.attention import SAVED_NAMES

    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
    kept = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(*arrays)
    again = jax.make_jaxpr(jax.grad(jax.checkpoint(loss)))(*arrays)
    assert str(kept).count('dot_general') == 8
    assert str(again).count('dot_general') == 10
    chex.assert_trees_all_close(jax.grad(jax.checkpoint(loss, policy=policy))(*arrays), jax.grad(loss)(*arrays))
