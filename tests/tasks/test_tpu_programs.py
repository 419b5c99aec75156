"""What XLA's TPU compiler makes of a step, by its text: collectives, products and searches that must not be there."""

import importlib.util
import math
import types

import jax
import pytest

from jaxtune.cost import hlo
from jaxtune.recipe import recipes
from jaxtune.tasks import ahead
from jaxtune.tasks import compile as compile_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="needs libtpu, which compiles for TPUs: pip install 'jaxtune[tpu]'",
)

WIDTH, HIDDEN, VOCAB, LAYERS, LENGTH = 1024, 4096, 8192, 4, 512
KERNELS = {(WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCAB)}


@pytest.fixture(autouse=True)
def _flags_of_the_cpu_read_and_gone(monkeypatch):
    """libtpu reads them too when it is loaded, and ends the process over one that it does not know."""
    jax.devices()
    monkeypatch.delenv('XLA_FLAGS')


def program(tmp_path, monkeypatch, topology='v5e:2x4', **changes) -> hlo.Module:
    tmp_path.mkdir(exist_ok=True)
    config = recipes.defaults()
    fields = {
        'model_type': 'llama', 'vocab_size': VOCAB, 'hidden_size': WIDTH, 'intermediate_size': HIDDEN,
        'num_hidden_layers': LAYERS, 'num_attention_heads': 8, 'max_position_embeddings': LENGTH,
    }  # fmt: skip
    settings = {'task': 'compile', 'model.config': fields, 'data.seq_len': LENGTH, 'train.batch_size': 8}
    settings |= {'model.param_dtype': 'bfloat16', 'model.compute_dtype': 'bfloat16', 'model.remat': 'full'}
    settings |= {'compile.topology': topology, 'mesh.data': 1, 'mesh.fsdp': -1}
    recipes.apply_overrides(config, settings | {name.replace('__', '.'): value for name, value in changes.items()})
    texts, read = [], ahead._text
    monkeypatch.setattr(ahead, '_text', lambda compiled: texts.append(read(compiled)) or texts[-1])
    command = types.SimpleNamespace(argv=('jaxtune',), recipe='recipe.py', workdir=tmp_path, overwrite=False)
    compile_task.run(config, tmp_path, command)
    return hlo.parse(texts[0])


def all_of(module: hlo.Module) -> list[tuple[str, hlo.Instruction]]:
    return [(name, one) for name, computation in module.computations.items() for one in computation.values()]


def test_gradients_are_scattered_and_products_are_whole(tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch)
    scattered, reduced = 0, []
    for name, one in all_of(module):
        if one.opcode.startswith('all-reduce'):
            whole = [array for array in one.results if array.dims[-2:] in KERNELS]
            scattered += len(whole) if 'all-reduce-scatter' in name else 0
            reduced += whole if 'all-reduce-scatter' not in name else []
    assert scattered > 0
    assert not reduced, "a whole kernel's gradient is summed on every device"
    # A product that is cut into a loop over parts of its kernel passes those round.
    passed = [one for _, one in all_of(module) if one.opcode.startswith('collective-permute')]
    assert not [one for one in passed if any(array.size >= WIDTH * WIDTH // 8 for array in one.results)]
    # The vocabulary's kernel stays divided.
    gathered = [one for _, one in all_of(module) if one.opcode.startswith('all-gather')]
    assert not [one for one in gathered if any(set(array.dims[-2:]) == {WIDTH, VOCAB} for array in one.results)]


def test_eight_bit_moments_are_neither_searched_nor_looked_up(tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch, optimizer__name='adamw8bit')
    own = [one for _, one in all_of(module) if 'optimizer' in one.op_name]
    assert any(array.dtype == 'u8' for one in own for array in one.results)
    assert not [one for one in own if 'searchsorted' in one.op_name or one.opcode == 'gather']


def test_a_divided_sequence_runs_the_fused_kernel(tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch, mesh__fsdp=2, mesh__sequence=4, train__batch_size=2)
    kernels = [one.name for _, one in all_of(module) if 'tpu_custom_call' in one.text]
    assert any(name.startswith('splash') for name in kernels)
    # Parameters and their state are divided over it too.
    assert not [
        one
        for one in module.computations[module.entry].values()
        if one.opcode == 'parameter'
        and any(math.prod(array.dims) >= LAYERS * WIDTH * HIDDEN // 2 for array in one.results)
    ]


def _calls(module: hlo.Module, computation: str, name: str, times: int = 1) -> int:
    """How often a program runs a kernel whose name begins so: the calls of a loop's body times its trips."""
    count = 0
    for one in module.computations.get(computation, {}).values():
        count += times * (one.name.startswith(name) and 'tpu_custom_call' in one.text)
        if one.opcode == 'while':
            count += _calls(module, one.attribute(r'body=%?([\w.\-]+)'), name, times * module.trips(one))
        else:
            count += sum(_calls(module, inner, name, times) for inner in one.called)
    return count


@pytest.mark.parametrize('remat', ['full', pytest.param('attn_out,mlp_in', marks=pytest.mark.exhaustive)])
def test_attention_runs_forward_once_a_layer(tmp_path, monkeypatch, remat):
    module = program(tmp_path, monkeypatch, model__remat=remat)
    assert _calls(module, module.entry, 'splash_mha_fwd') == LAYERS
    assert _calls(module, module.entry, 'splash_mha_dkv') == LAYERS


def test_layer_inputs_lie_in_the_hosts_memory(tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch, model__remat='offload')
    # XLA writes that as memory space 5.
    stacks = {f'bf16[{LAYERS},1,{LENGTH},{WIDTH}]'}
    kept = [one.text for _, one in all_of(module) if 'S(5)' in one.text and any(str(a) in stacks for a in one.results)]
    assert kept


def test_lora_makes_no_gradient_of_a_frozen_kernel(tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch, method__name='lora')
    made = [one for _, one in all_of(module) if one.opcode in ('dot', 'convolution')]
    assert made
    assert not [one for one in made if one.results[0].dims[-2:] in KERNELS and 'transpose(' in one.op_name]


@pytest.mark.exhaustive
def test_slices_send_each_other_sums_alone(tmp_path, monkeypatch):
    module = program(tmp_path, monkeypatch, '2xv5e:2x2', mesh__data=2, mesh__slices=2, train__batch_size=16)
    between = [one.text for _, one in all_of(module) if one.opcode == 'send' and 'xla_megascale_runtime' in one.text]
    assert between
    assert all('_xla_megascale_transfer_type="ALL_REDUCE"' in text for text in between)
    # What the parameters are gathered over stays within a slice.
    groups = [one.text for _, one in all_of(module) if one.opcode.startswith('all-gather')]
    assert groups
    assert all('replica_groups={{0,1,2,3}}' in text or 'replica_groups=[1,4]' in text for text in groups)
