"""NF4's fused product: in Pallas' interpreter the leaf's own numbers, and programs of TPUs and GPUs that hold it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import cost, models
from jaxtune.cost import hlo
from jaxtune.parallel import make_mesh
from jaxtune.parallel.topology import topology_devices
from jaxtune.weights import NF4, Codec, LoRA, dot
from jaxtune.weights.nf4 import VALUES
from jaxtune.weights.nf4_kernel import FEW, by_halves, fused_dot

COMPILER = {'tpu': 'libtpu', 'gpu': 'jax_plugins.xla_cuda13'}


def installed(platform) -> bool:
    try:
        return importlib.util.find_spec(COMPILER[platform]) is not None
    except ModuleNotFoundError:
        return False


def leaf_of(shape, block=64, double_quant=True) -> NF4:
    kernel = np.random.default_rng(0).standard_t(3, shape).astype(np.float32)
    return jax.jit(Codec(block, double_quant).encode_kernel)(kernel)


def run(x, leaf, platform):
    return fused_dot(x, leaf.codes, leaf.wide_scales(), VALUES, interpret=platform)


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
@pytest.mark.parametrize(
    ('shape', 'block', 'double_quant'),
    # Also inputs and outputs whose last tile is not full, on a TPU.
    [((256, 128), 64, True), ((512, 384), 16, False), ((2304, 128), 256, True)],
)
def test_its_weights_are_the_leafs_bit_for_bit(platform, shape, block, double_quant):
    """One token that is 1 in one place and 0 elsewhere gets that input's weights, in whatever order sums are made."""
    leaf = leaf_of(shape, block, double_quant)
    places = np.random.default_rng(1).permutation(shape[0])[:FEW]
    x = jnp.zeros((len(places), shape[0])).at[jnp.arange(len(places)), places].set(1.0)
    np.testing.assert_array_equal(run(x, leaf, platform), leaf.materialise()[places])


@pytest.mark.parametrize('tokens', [1, 8, 40])
def test_one_tile_is_the_product_of_what_the_codes_stand_for_bit_for_bit(tokens):
    leaf = leaf_of((1024, 256))
    x = jax.random.normal(jax.random.key(0), (tokens, 1024))
    padded = jnp.pad(x, ((0, -tokens % 8), (0, 0)))
    # The order of sums is that of the codes: the leaf's own, with its inputs in that order.
    expected = jax.lax.dot_general(by_halves(leaf.dequantise()), by_halves(padded), (((1,), (1,)), ((), ()))).T
    np.testing.assert_array_equal(run(x, leaf, 'tpu'), expected[:tokens])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
@pytest.mark.parametrize('tokens', [1, 17])
def test_it_is_the_leafs_own_product_but_for_the_order_of_sums(platform, tokens, dtype):
    leaf = leaf_of((4352, 256))
    x = jax.random.normal(jax.random.key(0), (tokens, 4352)).astype(dtype)
    found, expected = (np.asarray(y, np.float64) for y in (run(x, leaf, platform), dot(x, leaf)))
    assert run(x, leaf, platform).dtype == dtype
    wide = np.asarray(leaf.dequantise(dtype), np.float64)
    # A float32 sum of n terms is off by n roundings of the sum of their sizes at most; the result is rounded once more.
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(wide).T
    bound = 2 * 4352 * np.finfo(np.float32).eps * size + float(jnp.finfo(dtype).eps) * np.abs(expected)
    assert (np.abs(found - expected) <= bound).all()


def test_a_cpu_takes_xlas_path_and_the_model_says_so():
    fields = {'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 64, 'intermediate_size': 64}
    fields |= {'num_hidden_layers': 1, 'num_attention_heads': 2}
    model = models.build(models.read_config(fields))

    def run(rng):
        params = model.init(rng)
        mlp = params['layers']['mlp']
        base = Codec().encode_kernel(mlp['up_proj']['kernel'])
        mlp['up_proj']['kernel'] = LoRA(base, jnp.zeros((1, 64, 2)), jnp.zeros((1, 2, 64)), jnp.ones(1))
        return model.apply(params, {'tokens': jnp.ones((1, 4), jnp.int32)}).hidden

    jax.eval_shape(run, jax.random.key(0))
    assert model.kernels.products == {'nf4 xla': ''}
    assert model.kernels.products_line == 'nf4 xla'


def program(topology, tokens, *, devices=1, shape=(4096, 1024), dtype=jnp.bfloat16):
    """A product, lowered; what `product` says of it; and the device."""
    target = topology_devices(topology)[:devices]
    mesh = make_mesh({'fsdp': -1, 'data': 1}, target)
    leaf = jax.eval_shape(Codec(dtype='bfloat16').encode_kernel, jax.ShapeDtypeStruct(shape, jnp.float32))
    args = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, P())),
        (jax.ShapeDtypeStruct((tokens, shape[0]), dtype), leaf),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        said = []
        lowered = jax.jit(lambda x, leaf: said.append(leaf.product(x)) or dot(x, leaf)).lower(*args)
    return lowered, said[0], target[0]


@pytest.fixture
def _flags_of_the_cpu_read_and_gone(monkeypatch):
    """libtpu reads them too when it is loaded, and ends the process over one that it does not know."""
    jax.devices()
    monkeypatch.delenv('XLA_FLAGS')


TOPOLOGIES = [('tpu', 'v5e:2x2'), ('tpu', 'v6e:2x2'), ('gpu', 'cuda:h100x1'), ('gpu', 'cuda:rtx4090x1')]


@pytest.mark.usefixtures('_flags_of_the_cpu_read_and_gone')
@pytest.mark.parametrize(('platform', 'topology'), TOPOLOGIES)
def test_compiled_for_hardware_that_is_not_here(platform, topology):
    if not installed(platform):
        pytest.skip(f'needs {COMPILER[platform]}, which compiles for it')
    lowered, said, device = program(topology, 8)
    assert said == ('nf4 fused', '')
    text, chip = lowered.compile().as_text(), cost.chip_of(device)
    assert text
    assert chip
    module = hlo.parse(text)
    estimate = cost.estimate(module, chip, {})
    assert estimate
    assert [kernel.count for kernel in estimate.kernels if kernel.name == 'nf4_dot'] == [1]
    # No wide weight is written.
    written = [array for one in module.computations[module.entry].values() for array in one.results]
    assert max(array.nbytes for array in written if array.dtype in ('bf16', 'f32')) < 4096 * 1024
    program(topology, FEW, dtype=jnp.float32)[0].compile()  # what takes most of the memory on the chip
    lowered, said, _ = program(topology, FEW + 1)
    assert said == ('nf4 xla', '')
    assert 'tpu_custom_call' not in lowered.as_text()
    assert 'triton' not in lowered.as_text()
    assert '4096 x 1000' in program(topology, 8, shape=(4096, 1000))[1][1]


@pytest.mark.usefixtures('_flags_of_the_cpu_read_and_gone')
@pytest.mark.skipif(not installed('tpu'), reason='needs libtpu, which compiles for it')
def test_on_a_mesh_of_several_devices_xlas_path_stands_in():
    lowered, said, _ = program('v5e:2x2', 8, devices=4)
    assert said == ('nf4 xla', 'the fused kernel runs on one device, and the mesh has 4')
    assert 'tpu_custom_call' not in lowered.as_text()
