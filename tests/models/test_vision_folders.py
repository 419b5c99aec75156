"""Folders of models that read images too: the language model is read out of them, and exported by itself."""

import json
import re

import jax
import numpy as np
import pytest
from comparing import assert_close, compute_logits, torch_logits

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models import hf
from jaxtune.models.safetensors import read_header, write_file

TEXT = {
    'vocab_size': 97,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'max_position_embeddings': 64,
}
VISION = {
    'hidden_size': 16,
    'intermediate_size': 16,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'image_size': 28,
    'patch_size': 14,
}
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 1e6,
    'factor': 4.0,
    'original_max_position_embeddings': 5,
    'llama_4_scaling_beta': 0.5,
}
FOLDERS = {
    'gemma3': {
        'model_type': 'gemma3',
        'text_config': {**TEXT, 'model_type': 'gemma3_text', 'sliding_window': 5, 'num_hidden_layers': 6},
        'vision_config': {**VISION, 'model_type': 'siglip_vision_model'},
        'eos_token_id': [1, 6],
    },
    'mistral3': {
        'model_type': 'mistral3',
        'text_config': {**TEXT, 'model_type': 'ministral3', 'rope_parameters': YARN, 'tie_word_embeddings': True},
        'vision_config': {**VISION, 'model_type': 'pixtral', 'head_dim': 8},
        'tie_word_embeddings': False,
    },
    'mistral3-of-mistral': {
        'model_type': 'mistral3',
        'text_config': {**TEXT, 'model_type': 'mistral', 'sliding_window': 5},
        'vision_config': {**VISION, 'model_type': 'pixtral', 'head_dim': 8},
        'tie_word_embeddings': True,
    },
}
LANGUAGE = {'gemma3': 'gemma3_text', 'mistral3': 'ministral3', 'mistral3-of-mistral': 'mistral'}
# From the names that `transformers` writes to those that its versions between 4.52 and 5 wrote, and to plain ones.
NAMES = {
    'as published': {},
    'as in between': {
        r'^language_model\.model\.': 'model.language_model.',
        r'^language_model\.lm_head': 'lm_head',
        r'^(vision_tower|multi_modal_projector)': r'model.\1',
    },
    'as a base model': {r'^language_model\.model\.': 'language_model.', r'^language_model\.lm_head': 'lm_head'},
}


@pytest.fixture(scope='module', params=FOLDERS)
def theirs(request, tmp_path_factory):
    """`transformers`' model, its folder, and the type of its language model."""
    torch = pytest.importorskip('torch')
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields, folder = FOLDERS[request.param], tmp_path_factory.mktemp('images')
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation='eager')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + ('norm' in name) * parameter)
    model.eval().save_pretrained(folder)
    # As published: without the fields that have their defaults.
    (folder / 'config.json').write_text(json.dumps(fields))
    return model, folder, LANGUAGE[request.param]


def renamed(folder, new, changes):
    new.mkdir()
    (new / 'config.json').write_text((folder / 'config.json').read_text())
    entries = {}
    for name, entry in read_header(folder / 'model.safetensors').items():
        for pattern, replacement in changes.items():
            name = re.sub(pattern, replacement, name)
        entries[name] = entry
    specs = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    write_file(new / 'model.safetensors', specs, (entry.read() for entry in entries.values()))
    return new


@pytest.mark.parametrize('names', NAMES)
def test_the_language_model_is_read_out_and_exported_by_itself(theirs, names, tmp_path, capsys):
    import transformers

    torch_model, folder, model_type = theirs
    folder = renamed(folder, tmp_path / 'renamed', NAMES[names])
    fields = models.read_config(folder)
    assert fields['model_type'] == model_type
    model = models.build(fields)
    capsys.readouterr()
    assert not hf.newly_initialized_paths(folder, model)
    (said,) = capsys.readouterr().out.splitlines()
    vision = [name for name in read_header(folder / 'model.safetensors') if 'vision' in name or 'projector' in name]
    assert said.startswith(f'{folder}: {len(vision)} tensors are not used, such as ')
    assert said.rsplit(' ', 1)[1] in vision

    params, missing = hf.load(folder, model)
    assert not missing
    assert not capsys.readouterr().out  # it is said once
    assert not hf.has_own_head(folder, model)
    tokens = np.random.default_rng(0).integers(3, 97, (2, 24)).astype(np.int32)
    ours, expected = compute_logits(model, params, {'tokens': tokens}), torch_logits(torch_model, input_ids=tokens)
    assert_close(ours, expected)

    hf.save(tmp_path / 'export', model, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export', attn_implementation='eager')
    assert again.config.model_type == model_type
    assert_close(torch_logits(again, input_ids=tokens), expected)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / 'export', model)[0], params)


def test_what_the_whole_folder_says_of_tokens_counts(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(FOLDERS['gemma3']))
    assert models.read_config(tmp_path)['eos_token_id'] == [1, 6]


def test_a_layer_too_many_is_refused(theirs, tmp_path):
    _, folder, _ = theirs
    fields = json.loads((folder / 'config.json').read_text())
    fields['text_config']['num_hidden_layers'] = 1
    folder = renamed(folder, tmp_path / 'short', {})
    (folder / 'config.json').write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r'tensor language_model\.model\.layers\.1\..* has no place'):
        hf.load(folder, models.build(models.read_config(folder)))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ({'model_type': 'nothing'}, r'config.json: text_config.model_type=.nothing.: expected one of'),
        ({'intermediate_size': 0}, r'config.json: text_config.intermediate_size=0: expected'),
        ('small', r'config.json: text_config=.small.: expected fields'),
    ],
)
def test_a_language_model_that_cannot_be_built_is_refused_by_name(text, message, tmp_path):
    config = {**FOLDERS['mistral3-of-mistral'], 'text_config': text}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        models.read_config(tmp_path)
