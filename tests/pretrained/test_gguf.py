"""GGUF files: every tensor within its format's bound, names, metadata, tokenizer, and what reads them back."""

import builtins
import json

import jax
import numpy as np
import pytest

from jaxtune import main, models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.models.model import leaf_paths
from jaxtune.pretrained import gguf_families, gguf_file, gguf_tokenizer, q4_k
from jaxtune.pretrained.save import save

gguf = pytest.importorskip('gguf')

_SIZES = {
    'vocab_size': 320,
    'hidden_size': 256,
    'intermediate_size': 256,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'tie_word_embeddings': False,
}


@pytest.fixture(scope='module')
def tokenizer():
    made = tokenizers.train_bpe(['the quick brown fox jumps over the lazy dog'] * 4, 300)
    made.chat_template = '{% for m in messages %}{{ m.content }}<eos>{% endfor %}'
    return made


def export(folder, tokenizer, quantise='', dtype='float32', **fields):
    model = models.build(models.read_config({'model_type': 'llama', **_SIZES, **fields}))
    params = jax.jit(model.init)(jax.random.key(0))
    save(folder, model, params, tokenizer, '', dtype, quantise)
    return model, params, folder / 'model.gguf'


def logits(model, params):
    batch = {'tokens': np.arange(16, dtype=np.int32)[None]}
    return np.asarray(jax.jit(lambda params: model.logits(params, model.apply(params, batch).hidden))(params))


@pytest.mark.parametrize(
    ('quantise', 'dtype', 'kind', 'limit'),
    [
        ('', 'float32', 'F32', 0.0),
        ('', 'bfloat16', 'BF16', 2**-8),
        ('q8_0', 'float32', 'Q8_0', 0.01),
        ('q4_0', 'float32', 'Q4_0', 0.11),
        ('q4_k', 'float32', 'Q4_K', 0.09),
    ],
)
def test_every_tensor_comes_back_within_the_bound(tmp_path, tokenizer, quantise, dtype, kind, limit):
    model, params, path = export(tmp_path / 'out', tokenizer, quantise, dtype)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert set(stored) == {part.name for part in gguf_families.parts(gguf, model)}
    assert stored['blk.0.attn_q.weight'] == kind
    assert stored['blk.0.attn_norm.weight'] == 'F32'
    assert stored['output.weight'] == ('Q8_0' if quantise else kind)
    read = leaf_paths(gguf_file.load(path, model))
    for leaf, value in leaf_paths(params).items():
        error = np.linalg.norm(np.asarray(read[leaf]) - np.asarray(value))
        assert error <= limit * np.linalg.norm(np.asarray(value)), leaf
    if not limit:  # the order of rows is undone
        np.testing.assert_array_equal(logits(model, gguf_file.load(path, model)), logits(model, params))


def test_metadata_and_tokenizer_are_the_models(tmp_path, tokenizer):
    model, _, path = export(tmp_path / 'out', tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    expected = {
        'general.architecture': 'llama',
        'llama.vocab_size': 320,
        'llama.context_length': 64,
        'llama.embedding_length': 256,
        'llama.feed_forward_length': 256,
        'llama.block_count': 2,
        'llama.attention.head_count': 4,
        'llama.attention.head_count_kv': 2,
        'llama.attention.key_length': 64,
        'llama.rope.dimension_count': 64,
        'llama.rope.freq_base': 10000.0,
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': 'qwen2',
        'tokenizer.ggml.eos_token_id': tokenizer.eos_token_id,
        'tokenizer.ggml.padding_token_id': tokenizer.pad_token_id,
        'tokenizer.ggml.add_bos_token': False,
        'tokenizer.chat_template': tokenizer.chat_template,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields['llama.attention.layer_norm_rms_epsilon'] == pytest.approx(model.config.norm_epsilon)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert fields['tokenizer.ggml.merges'] == [' '.join(pair) for pair in state['model']['merges']]
    size = len(tokenizer)
    assert fields['tokenizer.ggml.tokens'][:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert fields['tokenizer.ggml.token_type'][:4] == [3, 3, 3, 1]
    assert fields['tokenizer.ggml.token_type'][-1] == (1 if size == 320 else 5)


def test_transformers_reads_the_same_logits(tmp_path, tokenizer):
    torch = pytest.importorskip('torch')
    from transformers import AutoModelForCausalLM

    for model_type in ('llama', 'qwen2'):
        model, params, _ = export(tmp_path / model_type, tokenizer, model_type=model_type)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / model_type, gguf_file='model.gguf')
        with torch.no_grad():
            expected = theirs(torch.arange(16)[None]).logits.numpy()
        np.testing.assert_allclose(logits(model, params), expected, atol=1e-3)


def test_q4_k_fits_better_than_rounding():
    x = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32) * 0.02
    read = gguf.quants.dequantize(q4_k.quantise(x), gguf.GGMLQuantizationType.Q4_K)
    assert np.linalg.norm(read - x) < 0.08 * np.linalg.norm(x)
    limit = gguf_file.bound(x, 'Q4_K')
    assert (np.abs(read - x).reshape(*limit.shape[:-1], -1) <= limit).all()


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'model_type': 'olmo2'}, 'no mapping for model_type=olmo2; expected one of llama, mistral'),
        ({'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 1e4, 'factor': 2.0}}, 'rope_type=dynamic'),
    ],
)
def test_what_llama_cpp_lacks_is_refused(tokenizer, fields, said):
    model = models.build(models.read_config({'model_type': 'llama', **_SIZES, **fields}))
    with pytest.raises(UserError, match=said):
        gguf_file.check(model, tokenizer)


def test_a_tokenizer_that_is_no_bpe_is_refused():
    unigram = tokenizers.train(['the quick brown fox'] * 4, 300, 'unigram')
    with pytest.raises(UserError, match='of the kind Unigram; expected BPE'):
        gguf_tokenizer.read(gguf, unigram, 320)


def test_a_missing_package_is_one_line(monkeypatch):
    real = builtins.__import__

    def importing(name, *rest, **more):
        if name == 'gguf':
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, '__import__', importing)
    with pytest.raises(UserError, match='expected the package gguf'):
        gguf_file.package()


def test_task_export_tells_the_loss_of_the_file(tmp_path, tokenizer):
    export(tmp_path / 'base', tokenizer)
    (tmp_path / 'eval.jsonl').write_text(json.dumps({'text': 'the quick brown fox jumps'}) + '\n')
    keys = {
        'model.path': tmp_path / 'base', 'data.eval': tmp_path / 'eval.jsonl', 'data.seq_len': 32,
        'export.format': 'gguf', 'export.quantise': 'q8_0',
    }  # fmt: skip
    words = [f'--config.{name}={value}' for name, value in keys.items()]
    assert main.main(['jaxtune', '--config', 'configs/export.py', '--workdir', str(tmp_path / 'w'), *words]) == 0
    metrics = json.loads((tmp_path / 'w' / 'result.json').read_text())['metrics']
    assert metrics['eval/loss_gguf'] == pytest.approx(metrics['eval/loss'], abs=0.01)
    assert (tmp_path / 'w' / 'export' / 'model.gguf').stat().st_size == metrics['export/gguf_bytes']


@pytest.mark.parametrize('model_type', ['mistral', 'qwen3', 'qwen3_moe', 'gemma2', 'gemma3_text', 'phi3', 'gpt2'])
def test_every_family_comes_back(tmp_path, tokenizer, model_type):
    fields = {'model_type': model_type, 'head_dim': 64, 'query_pre_attn_scalar': 64, 'pad_token_id': 0}
    fields |= {'gpt2': {'n_embd': 64, 'n_layer': 2, 'n_head': 4, 'n_positions': 64}}.get(model_type, {})
    fields |= (
        {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 64} if model_type == 'qwen3_moe' else {}
    )
    fields |= {'norm_topk_prob': True} if model_type == 'qwen3_moe' else {}
    fields |= {'tie_word_embeddings': True} if model_type.startswith('gem') or model_type == 'gpt2' else {}
    made = {**_SIZES, **fields}
    if model_type == 'gpt2':
        made = {name: value for name, value in fields.items() if name[:4] not in ('head', 'quer')} | {'vocab_size': 320}
    elif not model_type.startswith('gem'):
        made.pop('query_pre_attn_scalar')
    if model_type == 'phi3':
        made.pop('head_dim')
    model = models.build(models.read_config(made))
    params = jax.jit(model.init)(jax.random.key(0))
    save(tmp_path / 'out', model, params, tokenizer, '', 'float32', '')
    read = leaf_paths(gguf_file.load(tmp_path / 'out' / 'model.gguf', model))
    for leaf, value in leaf_paths(params).items():
        np.testing.assert_allclose(np.asarray(read[leaf]), np.asarray(value), atol=1e-6, err_msg=leaf)
