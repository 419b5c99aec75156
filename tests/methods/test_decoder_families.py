"""Every method on decoders that are unlike Llama, and their adapters in Hugging Face's `peft`."""

import jax
import numpy as np
import pytest
from test_methods import VARIANTS, moved, one_device, settings, tuned

from jaxtune import models
from jaxtune.methods import peft
from jaxtune.methods.targets import linear
from jaxtune.models import hf
from jaxtune.tasks import specs
from jaxtune.tasks.export import merged

_SIZES = {
    'vocab_size': 96, 'hidden_size': 64, 'intermediate_size': 128, 'num_attention_heads': 4, 'num_key_value_heads': 2,
    'max_position_embeddings': 64, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0, 'initializer_range': 0.1,
}  # fmt: skip
TYPES = ['sliding_attention', 'full_attention']
FAMILIES = {
    'gemma2': {'head_dim': 16, 'sliding_window': 9},
    'gemma3_text': {'head_dim': 16, 'sliding_window': 9, 'layer_types': TYPES},
    'cohere2': {'sliding_window': 9, 'layer_types': TYPES, 'logit_scale': 1.0},
    'starcoder2': {'sliding_window': 9},
    'granite': {'embedding_multiplier': 3.0, 'residual_multiplier': 0.5, 'attention_multiplier': 0.3},
    'glm4': {'head_dim': 16},
}
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 16)).astype(np.int32)
USUAL = ('gemma3_text', 'cohere2')
every = pytest.mark.parametrize(
    'family',
    [pytest.param(family, marks=() if family in USUAL else pytest.mark.exhaustive) for family in FAMILIES],
)


def build(family):
    fields = {'model_type': family, **_SIZES, 'num_hidden_layers': 2, **FAMILIES[family]}
    model = models.build(models.read_config(fields))
    return model, jax.jit(model.init)(jax.random.key(0))


def logits(model, params):
    return np.asarray(jax.jit(lambda p: model.logits(p, model.apply(p, {'tokens': TOKENS}).hidden))(params))


@every
@pytest.mark.parametrize('name', VARIANTS)
def test_begins_at_the_model_and_merges_into_the_same_function(family, name):
    config, (model, params) = settings(**VARIANTS[name]), build(family)
    stored, params = tuned(config, model, params, one_device())
    if config.method.name != 'prompt':
        np.testing.assert_array_equal(logits(model, params), logits(model, stored))
    params = moved(config, params)
    found = logits(model, params)
    assert np.abs(found - logits(model, stored)).max() > 1e-3
    if specs.method(config).method.merges:
        again = logits(model, merged(params, ''))
        np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-5 * np.abs(found).max())


@every
def test_lora_goes_to_all_linear_layers(family):
    model, _ = build(family)
    gate = set() if family == 'starcoder2' else {'gate_up_proj'} if family == 'glm4' else {'gate_proj', 'up_proj'}
    mlp = {'down_proj', *(gate or {'up_proj'})}
    expected = {'self_attn': {'q_proj', 'k_proj', 'v_proj', 'o_proj'}, 'mlp': mlp}
    paths = {f'layers/{part}/{name}/kernel' for part, names in expected.items() for name in names}
    assert set(linear(model)) == paths


@every
@pytest.mark.parametrize('name', ['lora', 'prompt', 'prefix'])
def test_peft_computes_the_same_with_an_adapter_from_here(family, name, tmp_path):
    torch, theirs = pytest.importorskip('torch'), pytest.importorskip('peft')
    from transformers import AutoModelForCausalLM

    config, (model, params) = settings(**VARIANTS[name]), build(family)
    hf.save(tmp_path / 'base', model, params)
    _, params = tuned(config, model, params, one_device())
    params = moved(config, params)
    method = specs.method(config)
    method.method.save_adapter(tmp_path / 'adapter', params, model, config.method, str(tmp_path / 'base'))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / 'base', attn_implementation='eager')
    again = theirs.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
    with torch.no_grad():
        found = again(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()[:, -TOKENS.shape[1] :]
    ours = logits(model, params)
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-4 * np.abs(ours).max())


@every
def test_prefixes_of_another_program_are_read(family, tmp_path):
    config, (model, params) = settings(**VARIANTS['prefix']), build(family)
    _, prefixed = tuned(config, model, params, one_device())
    method = specs.method(config)
    method.method.save_adapter(tmp_path, prefixed, model, config.method, 'base')
    init, arrays = peft.reader(str(tmp_path), model)
    again = init(params, arrays)
    np.testing.assert_array_equal(logits(model, again), logits(model, prefixed))
