"""A mixture of experts tuned by a run: what it says, what it leaves, and going on where it stopped."""

import json
import shutil

import numpy as np
import pytest
from runs import exported, recipe, train

from jaxtune.errors import UserError
from jaxtune.methods import peft
from jaxtune.models.safetensors import read_header

_MIXTURE = {
    'model_type': 'qwen3_moe',
    'hidden_size': 32,
    'intermediate_size': 32,
    'moe_intermediate_size': 32,
    'num_hidden_layers': 2,
    'mlp_only_layers': [0],
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'num_experts': 8,
    'num_experts_per_tok': 2,
    'max_position_embeddings': 128,
}
_LORA = {
    'model__config': _MIXTURE,
    'method__name': 'lora',
    'method__rank': 2,
    'method__layers': '0:2',
    'method__dropout': 0.1,
    'method__ranks': 'experts.down_proj=1',
    'train__steps': 4,
    'train__batch_size': 4,
    'checkpoint__every': 2,
    'checkpoint__keep': 3,
}


def test_experts_and_a_router_are_tuned_and_a_run_goes_on(corpus, tmp_path, capsys):
    keys = recipe(corpus, **_LORA, method__also_train='gate')
    train(keys, tmp_path / 'whole')
    said = ' '.join(capsys.readouterr().out.split())
    assert '% of the parameters, all 8 experts of a layer among them' in said
    config = json.loads((tmp_path / 'whole' / 'adapter' / peft.CONFIG).read_text())
    assert config['modules_to_save'] == ['model.layers.1.mlp.gate']
    assert {'mlp.experts.down_proj', 'mlp.experts.gate_up_proj'} <= set(config['target_parameters'])
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '4')
    train(keys, tmp_path / 'cut')
    assert 'continuing from checkpoint 2 of 4' in capsys.readouterr().out
    assert exported(tmp_path / 'cut') == exported(tmp_path / 'whole')
    again = keys | {'model.path': str(tmp_path / 'whole' / 'base'), 'model.config': {}, 'train.steps': 1}
    again |= {'method.path': str(tmp_path / 'whole'), 'method.also_train': 'q_proj'}
    with pytest.raises(UserError, match=r'method\.also_train: .*q_proj is adapted by method\.path'):
        train(again, tmp_path / 'again')
    train(again | {'method.also_train': ''}, tmp_path / 'again')  # the router came along, and trains on
    arrays = {name: read_header(tmp_path / name / 'adapter' / peft.WEIGHTS) for name in ('whole', 'again')}
    assert arrays['again'].keys() == arrays['whole'].keys()
    gate = 'base_model.model.model.layers.1.mlp.gate.weight'
    assert np.any(arrays['again'][gate].read() != arrays['whole'][gate].read())


def test_targets_without_experts_are_pointed_out(corpus, tmp_path, capfd):
    wide = _MIXTURE | {'moe_intermediate_size': 128}
    keys = recipe(corpus, **_LORA | {'model__config': wide, 'method__targets': 'q_proj', 'train__steps': 1})
    train(keys, tmp_path / 'run')
    said = ' '.join(''.join(capfd.readouterr()).split())
    assert 'method.targets=q_proj: reaches no expert, and experts hold' in said
