"""Ahead-of-time compiling: topologies by name, what the compiler reports, and whether it fits."""

import importlib.util
import json
import math
import re
import types
from types import SimpleNamespace

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.parallel.aot import refused_bytes
from jaxtune.parallel.topology import CARDS, TPU_GIB, canonical, target_config, topology_devices, usable_bytes
from jaxtune.recipe import recipes
from jaxtune.tasks import ahead
from jaxtune.tasks import compile as compile_task

KEYS = {'fits', 'peak_bytes_per_device', 'argument_bytes', 'temp_bytes', 'seconds_to_compile', 'flops_per_step'}
SPEED = {'estimated_seconds', 'estimated_mfu', 'estimated_tokens_per_second'}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="needs libtpu, which compiles for TPUs: pip install 'jaxtune[tpu]'",
)

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec('jax_cuda13_plugin') is None,
    reason="needs JAX's CUDA plugin, which compiles for GPUs: pip install 'jaxtune[cuda]'",
)


@pytest.fixture(autouse=True)
def _flags_of_the_cpu_read_and_gone(monkeypatch):
    """libtpu reads them too when it is loaded, and ends the process over one that it does not know."""
    jax.devices()
    monkeypatch.delenv('XLA_FLAGS')


def recipe(**changes):
    config = recipes.defaults()
    fields = {
        'model_type': 'llama', 'vocab_size': 256, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
        'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 128,
    }  # fmt: skip
    fields |= changes.pop('fields', {})
    settings = {'task': 'compile', 'model.config': fields, 'data.seq_len': 128, 'train.batch_size': 8}
    recipes.apply_overrides(config, settings | {name.replace('__', '.'): value for name, value in changes.items()})
    return config


def compiled(config, workdir, capsys) -> dict:
    """Runs the task; returns the line that it prints, checked against the files that it leaves."""
    workdir.mkdir(exist_ok=True)
    command = types.SimpleNamespace(argv=('jaxtune',), recipe='recipe.py', workdir=workdir, overwrite=False)
    capsys.readouterr()
    result = compile_task.run(config, workdir, command)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(printed) == KEYS | (SPEED if printed['fits'] else set())
    assert result == json.loads((workdir / 'result.json').read_text())
    assert (result['task'], result['status']) == ('compile', 'done')
    for written in (result['metrics'], json.loads((workdir / 'compile.json').read_text())):
        assert {name: written[name] for name in printed} == printed
    assert printed['peak_bytes_per_device'] >= printed['argument_bytes'] > 0
    return printed


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('v5x:4x4', 'nearest: v5'),
        ('h2000', 'h200x8'),
        ('v5e-12', 'expected a slice that there is: v5e-1, v5e-4, v5e-8'),
        ('v5p-7', 'v5p-8, v5p-16'),
        ('v5e', 'chips along each axis'),
        ('v5e:16', 'chips along each axis'),
        ('cuda:h300x8', 'CARD one of t4, a100-40g'),
        ('cuda:h200x0', 'cuda:CARDxNUMBER'),
        ('cuda:h200x12', 'at most 8 GPUs, or a multiple of 8'),
        pytest.param('v5e:3x3', 'not divisible', marks=needs_libtpu),
    ],
)
def test_a_topology_that_cannot_be_is_one_line(name, expected):
    with pytest.raises(UserError) as caught:
        topology_devices(name)
    assert str(caught.value).startswith(f"compile.topology='{name}': expected")
    assert expected in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('v5e-4', 'v5e:2x2'),
        ('v5litepod-16', 'v5e:4x4'),
        ('v6e-8', 'v6e:2x4'),
        ('v5p-8', 'v5p:2x2x1'),
        ('v4-128', 'v4:4x4x4'),
        ('v3-8', 'v3:2x2'),
        ('rtx4090', 'cuda:rtx4090x1'),
        ('cuda:h200', 'cuda:h200x1'),
        ('h100x8', 'cuda:h100x8'),
        ('a100-80gx8', 'cuda:a100-80gx8'),
        ('v5e:4x8', 'v5e:4x8'),
        ('cuda:h200x16', 'cuda:h200x16'),
    ],
)
def test_what_clouds_call_them(name, expected):
    assert canonical(name) == expected


@pytest.mark.parametrize(('name', 'extra'), [('v5e:2x2', 'jaxtune[tpu]'), ('cuda:h200x8', 'jaxtune[cuda]')])
def test_a_missing_plugin_names_its_extra(monkeypatch, name, extra):
    def missing(*args, platform, **kwargs):
        raise RuntimeError('not installed') if platform == 'tpu' else NotImplementedError('not implemented')

    monkeypatch.setattr('jax.experimental.topologies.get_topology_desc', missing)
    with pytest.raises(
        UserError, match=rf"compile.topology='{name}': needs .*pip install '{extra[:7]}\[{extra[8:-1]}\]'"
    ):
        topology_devices(name)


def test_every_card_has_its_multiprocessor():
    for name, card in CARDS.items():
        text = target_config(card)
        assert f'core_count: {card.cores} ' in text
        assert 0.85 * card.memory < usable_bytes(f'cuda:{name}x8') < card.memory
    assert 'shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448' in target_config(CARDS['h200'])


@needs_libtpu
def test_tpu_slices_by_name():
    slices = (('v5e:1x1', 1, 1), ('v5e:1x2', 2, 1), ('v5e:16x16', 256, 64), ('v6e:4x4', 16, 4))
    for name, count, hosts in (*slices, ('v5p:1x1x1', 1, 1), ('v5p:2x2x1', 4, 1), ('v5p:2x2x2', 8, 2)):
        devices = topology_devices(name)
        assert (len(devices), len({device.process_index for device in devices})) == (count, hosts)
        assert devices[0].platform == 'tpu'
        assert usable_bytes(name) == int(TPU_GIB[name.partition(':')[0]] * 2**30)


def test_local_devices_without_a_topology(tmp_path, capsys):
    printed = compiled(recipe(mesh__data=2, mesh__fsdp=-1, optimizer__name='sgd'), tmp_path, capsys)
    assert printed['fits']
    tokens, parameters = 8 * 128, 256 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert printed['flops_per_step'] == pytest.approx(tokens * (6 * parameters + 2 * 12 * 64 * 128), rel=0.5)
    written = json.loads((tmp_path / 'compile.json').read_text())
    assert written['collectives']['all-gather']['bytes']['fsdp'] > 0
    assert 0 < printed['estimated_mfu'] < 1
    assert printed['estimated_tokens_per_second'] == pytest.approx(tokens / printed['estimated_seconds'], rel=1e-3)
    spent = sum(cost['seconds'] for cost in written['costs']) + written['blocking_seconds']
    assert spent == pytest.approx(printed['estimated_seconds'], rel=1e-3)
    assert {'vocabulary', 'optimizer', 'layers/mlp/up_proj'} <= {cost['part'] for cost in written['costs']}
    page = (tmp_path / 'report.html').read_text()
    assert 'fits: ' in page
    assert 'vocabulary, forward' in page
    assert len(jax.devices()) == 8


@needs_libtpu
def test_a_small_model_fits_a_tpu_and_a_huge_one_does_not(tmp_path, capsys):
    settings = {'compile__topology': 'v5e:2x2', 'mesh__data': 1, 'mesh__fsdp': 4}
    settings |= {'model__compute_dtype': 'bfloat16', 'model__attention': 'flash', 'model__remat': 'full'}
    small = compiled(recipe(**settings), tmp_path / 'small', capsys)
    assert small['fits']
    assert small['peak_bytes_per_device'] < 2**27
    written = json.loads((tmp_path / 'small' / 'compile.json').read_text())
    assert written['device_kind'] == 'TPU v5 lite'
    assert {kernel['name'].split('_segmented')[0] for kernel in written['kernels']} >= {'splash_mha_fwd'}
    assert small['estimated_seconds'] > 0

    fields = {'hidden_size': 1024, 'intermediate_size': 4096, 'num_hidden_layers': 1000}
    huge = compiled(recipe(fields=fields, train__accumulate=1, **settings), tmp_path / 'huge', capsys)
    assert not huge['fits']
    assert huge['peak_bytes_per_device'] > usable_bytes('v5e:2x2')
    assert (
        huge['argument_bytes'] > 1000 * (3 * 1024 * 4096) * 4 * 3 // 4
    )  # weights and two moments in float32 on 4 chips


@needs_libtpu
def test_no_copy_of_all_layers_codes(tmp_path, capsys):
    """XLA would turn the codes of a whole stack before the scan over the layers."""
    layers, width = 128, 512
    fields = {'hidden_size': width, 'intermediate_size': width, 'num_hidden_layers': layers, 'num_key_value_heads': 4}
    settings = {'compile__topology': 'v5p:1x1x1', 'model__compute_dtype': 'bfloat16', 'model__remat': 'full'}
    settings |= {'method__name': 'qlora', 'method__rank': 1, 'train__batch_size': 1}
    found = compiled(recipe(fields=fields, **settings), tmp_path, capsys)
    codes = layers * 7 * width * width // 2
    assert found['argument_bytes'] > codes
    assert found['temp_bytes'] < codes


@needs_libtpu
def test_a_mesh_gathers_no_codes(tmp_path, capsys, monkeypatch):
    """Each device widens its own rows of them."""
    texts, read = [], ahead._text
    monkeypatch.setattr(ahead, '_text', lambda program: texts.append(read(program)) or texts[-1])
    fields = {'hidden_size': 512, 'intermediate_size': 1024, 'num_key_value_heads': 4}
    settings = {'compile__topology': 'v5e:2x2', 'mesh__data': 1, 'mesh__fsdp': 4, 'method__name': 'qlora'}
    compiled(recipe(fields=fields, model__compute_dtype='bfloat16', **settings), tmp_path, capsys)
    gathered = [line for line in texts[0].splitlines() if ' all-gather' in line]
    assert gathered
    assert not [line for line in gathered if ' u8[' in line or '(u8[' in line]


_TOKENS, _EXPERTS, _WIDTH = 8 * 128, 64, 64


@pytest.mark.parametrize('method', ['full', 'qlora'])
@pytest.mark.parametrize(
    ('topology', 'mesh', 'product'),
    [
        ('', {'mesh__data': 1, 'mesh__fsdp': 2, 'mesh__expert': 4}, 'blocks'),
        pytest.param('v5e:2x2', {'mesh__data': 1, 'mesh__expert': 4}, 'megablox', marks=needs_libtpu),
        pytest.param('cuda:h200x1', {}, 'blocks', marks=needs_cuda),
    ],
)
def test_no_array_of_experts_by_tokens(tmp_path, capsys, monkeypatch, topology, mesh, product, method):
    """Rows are multiplied by the kernels of the experts that they chose, and by no other."""
    texts, read = [], ahead._text
    monkeypatch.setattr(ahead, '_text', lambda program: texts.append(read(program)) or texts[-1])
    fields = {'model_type': 'qwen3_moe', 'num_experts': _EXPERTS, 'num_experts_per_tok': 2, 'head_dim': 16}
    fields |= {'moe_intermediate_size': _WIDTH, 'num_hidden_layers': 2}
    settings = {'compile__topology': topology, 'method__name': method, 'model__compute_dtype': 'bfloat16', **mesh}
    compiled(recipe(fields=fields, moe__aux_loss=0.01, **settings), tmp_path, capsys)
    (words,) = json.loads((tmp_path / 'compile.json').read_text())['experts']
    assert words.startswith(product)
    largest = max(math.prod(map(int, dims.split(','))) for dims in re.findall(r'[a-z]\d+\[([\d,]+)\]', texts[0]))
    devices = math.prod(mesh.values()) if mesh else 1
    assert largest < _EXPERTS * _TOKENS * _WIDTH // devices


def test_the_compiler_s_refusals_are_read():
    assert refused_bytes('Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.') == 20.5 * 2**30
    text = 'the total memory required for HLO temporaries (512.00G) exceeds available HBM (15.75G)'
    assert refused_bytes(text) == 512 * 2**30
    assert refused_bytes('out of luck') == 0


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'train__batch_size': 4, 'mesh__data': 8}, 'train.batch_size=4'),
        ({'mesh__fsdp': 3}, 'mesh.fsdp=3'),
        ({'data__seq_len': 256}, 'data.seq_len=256'),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        compile_task.run(recipe(**changes), tmp_path, SimpleNamespace(argv=(), recipe=''))
