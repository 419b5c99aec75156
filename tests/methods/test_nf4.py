"""NF4 is bitsandbytes' NF4, bit for bit, and a product with it is one with what it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.weights import Codec, dot, nf4
from jaxtune.weights.blockwise8 import dynamic_map
from jaxtune.weights.nf4 import NF4, VALUES, mean

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('bitsandbytes.functional')

_RNG = np.random.default_rng(0)
WEIGHTS = {
    'random': _RNG.normal(size=(256, 512)),
    'heavy tails': _RNG.standard_t(1.5, size=(192, 320)),
    'constant': np.full((64, 128), 0.3),
    'zero': np.zeros((64, 64)),
    'mostly zero': np.where(_RNG.random((128, 256)) < 0.9, 0, _RNG.normal(size=(128, 256))),
    'odd': _RNG.normal(size=(37, 51)),
    'odd, even rows': _RNG.normal(size=(33, 98)),
    'a few': _RNG.normal(size=(3, 5)),
    'many scales': _RNG.normal(size=(1024, 1024)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """The order in which many threads of PyTorch add up is not defined."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tables_are_theirs():
    np.testing.assert_array_equal(VALUES, theirs.get_4bit_type('nf4', device='cpu').numpy())
    for signed in (True, False):
        np.testing.assert_array_equal(dynamic_map(signed), theirs.create_dynamic_map(signed).numpy())


@pytest.mark.parametrize('double_quant', [False, True], ids=['single', 'double'])
@pytest.mark.parametrize('name', WEIGHTS)
def test_bit_for_bit(name, double_quant):
    weight = WEIGHTS[name].astype(np.float32)
    leaf = jax.jit(Codec(64, double_quant).encode)(weight)
    codes, state = theirs.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, compress_statistics=double_quant, quant_type='nf4'
    )
    np.testing.assert_array_equal(np.asarray(leaf.codes).reshape(-1), codes.numpy().reshape(-1))
    np.testing.assert_array_equal(np.asarray(leaf.scales).reshape(-1), state.absmax.numpy())
    if double_quant:
        np.testing.assert_array_equal(np.asarray(leaf.outer), state.state2.absmax.numpy())
        np.testing.assert_array_equal(np.asarray(leaf.offset), state.offset.numpy())
    dequantised = np.asarray(jax.jit(NF4.dequantise)(leaf))
    np.testing.assert_array_equal(dequantised, theirs.dequantize_4bit(codes, state).numpy())


@pytest.mark.parametrize('shape', [(64, 96), (5, 3), (1, 1)])
def test_a_tpu_finds_the_same_values(shape):
    codes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found, expected = (jax.jit(values)(codes) for values in (nf4._values_by_choice, nf4._values_by_table))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.asarray(found)[:, ::2], VALUES[codes >> 4])


@pytest.mark.parametrize('count', [1, 7, 8, 31, 100, 1001, 4097, 32767, 70001])
def test_the_mean_is_torch_s(count):
    values = np.random.default_rng(count).random(count).astype(np.float32)
    assert np.asarray(jax.jit(mean)(values)) == torch.from_numpy(values).mean().numpy()


def test_bits_a_weight():
    kernel = jax.random.normal(jax.random.key(0), (2, 1024, 2048))
    leaf = jax.jit(Codec().encode_kernel)(kernel)
    stored = 8 * sum(array.nbytes for array in jax.tree.leaves(leaf)) / kernel.size
    assert stored == pytest.approx(4.127, abs=5e-4)
    assert leaf.shape == kernel.shape
    assert leaf.size == kernel.size


@pytest.mark.parametrize('piece', [2**23, 500])
@pytest.mark.parametrize('shape', [(128, 96), (50, 36)])
def test_products_and_their_gradient(shape, piece, monkeypatch):
    """Stacked layers, and a backward pass that keeps codes rather than the wide weight; also piece by piece."""
    monkeypatch.setattr(nf4, '_PART', piece)
    kernel = jax.random.normal(jax.random.key(0), (2, *shape))
    leaf = Codec().encode_kernel(kernel)
    plain = leaf.materialise()
    assert plain.shape == kernel.shape
    assert float(jnp.abs(plain - kernel).mean()) < 0.1 * float(jnp.abs(kernel).mean())
    x = jax.random.normal(jax.random.key(1), (3, 5, shape[0]))

    def summed(x, weight):
        return jax.lax.scan(lambda y, layer: (y + jnp.sin(dot(x, layer)).sum(), None), 0.0, weight)[0]

    np.testing.assert_allclose(summed(x, leaf), summed(x, plain), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jax.grad(summed)(x, leaf), jax.grad(summed)(x, plain), rtol=1e-3, atol=1e-4)
    saved = jax.tree.leaves(jax.vjp(lambda x: dot(x, jax.tree.map(lambda part: part[0], leaf)), x)[1])
    assert all(array.size < shape[0] * shape[1] for array in saved)
