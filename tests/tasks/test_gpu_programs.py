"""What XLA's GPU compiler makes of a step, by its text: attention without an array of pairs of tokens."""

import importlib.util
import json
import re
import types

import jax
import pytest

from jaxtune.recipe import recipes
from jaxtune.tasks import compile as compile_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('jax_cuda13_plugin') is None,
    reason="needs JAX's CUDA plugin, which compiles for GPUs: pip install 'jaxtune[cuda]'",
)

LENGTH = 896  # no other dimension of the program's is a multiple of it
LLAMA = {
    'model_type': 'llama', 'vocab_size': 512, 'hidden_size': 256, 'intermediate_size': 512, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 64, 'max_position_embeddings': 2048,
}  # fmt: skip
GEMMA2 = {
    **LLAMA, 'model_type': 'gemma2', 'head_dim': 256, 'query_pre_attn_scalar': 256, 'sliding_window': 128,
    'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0, 'layer_types': None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _flags_of_the_cpu_read_and_gone(monkeypatch):
    jax.devices()
    monkeypatch.delenv('XLA_FLAGS')


def program(tmp_path, monkeypatch, capsys, topology, fields=LLAMA, **changes) -> tuple[str, str]:
    """The program's text, and what the task says of attention."""
    config = recipes.defaults()
    settings = {'task': 'compile', 'model.config': {k: v for k, v in fields.items() if v is not None}}
    settings |= {'data.seq_len': LENGTH, 'train.batch_size': 2, 'compile.topology': topology}
    settings |= {'model.compute_dtype': 'bfloat16', 'model.remat': 'full'}
    recipes.apply_overrides(config, settings | {name.replace('__', '.'): value for name, value in changes.items()})
    texts, read = [], compile_task._text
    monkeypatch.setattr(compile_task, '_text', lambda compiled: texts.append(read(compiled)) or texts[-1])
    command = types.SimpleNamespace(argv=('jaxtune',), recipe='recipe.py', workdir=tmp_path, overwrite=False)
    capsys.readouterr()
    compile_task.run(config, tmp_path, command)
    captured = capsys.readouterr()
    words = ' '.join((captured.out + captured.err).split())
    return texts[0], re.search(r'attention (.*?) batch ', words)[1]


def pairs_of_tokens(text: str) -> list[str]:
    """Arrays with two dimensions of a row's length or more."""
    shapes = set(re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', text))
    return [shape for shape in shapes if sum(int(n) % LENGTH == 0 for n in shape.split(',')) > 1]


@pytest.mark.parametrize('topology', ['cuda:h100x1', 'cuda:rtx4090x1'])
def test_packed_rows_make_no_array_of_pairs(tmp_path, monkeypatch, capsys, topology):
    text, said = program(tmp_path, monkeypatch, capsys, topology)
    assert not pairs_of_tokens(text)
    assert re.fullmatch(r'triton \(rows are packed, .*\)', said)
    written = json.loads((tmp_path / 'compile.json').read_text())
    assert {kernel['name'] for kernel in written['kernels']} == {'flash_forward', 'flash_keys', 'flash_queries'}
    assert all(kernel['seconds'] > 0 for kernel in written['kernels'])


def test_rows_of_one_text_run_cudnn_without_a_mask(tmp_path, monkeypatch, capsys):
    text, said = program(tmp_path, monkeypatch, capsys, 'cuda:h100x1', data__packing=False)
    assert said == 'cudnn'
    assert '__cudnn$fmhaSoftmaxBackward"' in text
    assert not pairs_of_tokens(text)


@pytest.mark.parametrize('topology', ['cuda:rtx4090x1', pytest.param('cuda:h100x2', marks=pytest.mark.exhaustive)])
def test_windows_by_layer_a_soft_cap_and_wide_heads_run_fused(tmp_path, monkeypatch, capsys, topology):
    more = {'mesh__data': 1, 'mesh__sequence': 2} if topology.endswith('x2') else {}
    text, said = program(tmp_path, monkeypatch, capsys, topology, GEMMA2, model__attention='flash', **more)
    assert said.startswith('triton')
    assert text.count('"__gpu$xla.gpu.triton"') >= 3
    assert not pairs_of_tokens(text)


def test_layer_inputs_lie_in_the_hosts_memory(tmp_path, monkeypatch, capsys):
    text, _ = program(tmp_path, monkeypatch, capsys, 'cuda:h100x1', model__remat='offload')
    # XLA writes that as memory space 5; all layers' inputs are one stack.
    assert re.search(rf'bf16\[2,2,{LENGTH},256\]\{{[\d,]*:?[^}}]*S\(5\)\}}', text)


@pytest.mark.exhaustive
def test_an_older_card_says_why_it_runs_none(tmp_path, monkeypatch, capsys):
    _, said = program(tmp_path, monkeypatch, capsys, 'cuda:t4x1')
    assert re.fullmatch(r'xla \(Triton needs compute capability 8\.0, .* 7\.5\)', said)
