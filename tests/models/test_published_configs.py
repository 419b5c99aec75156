"""What is read of the hub's `config.json` files, and what is refused."""

import json
import math

import jax
import published
import published_moe
import pytest

from jaxtune import models
from jaxtune.errors import UserError

PUBLISHED = published.PUBLISHED | published_moe.PUBLISHED


def read(fields, folder):
    (folder / 'config.json').write_text(json.dumps(fields))
    return models.read_config(folder)


def kinds(config):
    """Each layer's window, and which of the model's rotary frequencies it has, `-` for none."""
    distinct = [rope for rope in dict.fromkeys(config.ropes) if rope is not None]
    return ' '.join(
        f'{window or "all"}:{"-" if rope is None else distinct.index(rope)}'
        for window, rope in zip(config.windows, config.ropes, strict=True)
    )


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_makes_a_model(name, tmp_path):
    fields = read(PUBLISHED[name], tmp_path)
    model = models.build(fields)
    assert fields['vocab_size'] == model.config.vocab_size
    assert jax.tree.leaves(model.shapes)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('google/gemma-2b', 'all:0 all:0 all:0'),
        ('google/gemma-3-1b-it', ' '.join([*['512:0'] * 5, 'all:1', '512:0'])),
        ('google/gemma-3-270m', ' '.join([*['512:0'] * 5, 'all:1', '512:0'])),
        ('google/gemma-3-4b-it', ' '.join([*['1024:0'] * 5, 'all:1', '1024:0'])),
        ('HuggingFaceTB/SmolLM3-3B', 'all:0 all:0 all:0 all:- all:0'),
        ('allenai/Olmo-3-1025-7B', '4096:0 4096:0 4096:0 all:1'),
        ('CohereLabs/c4ai-command-r7b-12-2024', '4096:0 4096:0 4096:0 all:-'),
        ('LGAI-EXAONE/EXAONE-4.0-32B', '4096:0 4096:0 4096:0 all:-'),
        ('LGAI-EXAONE/EXAONE-4.0-1.2B', 'all:0 all:0 all:0'),
        ('mistralai/Ministral-8B-Instruct-2410', 'all:0 32768:0 32768:0 32768:0'),
        ('bigcode/starcoder2-3b', '4096:0 4096:0 4096:0'),
    ],
)
def test_layers_have_their_windows_and_frequencies(name, expected, tmp_path):
    assert kinds(models.build(read(PUBLISHED[name], tmp_path)).config) == expected


def test_what_the_oddities_become(tmp_path):
    configs = {name: models.build(read(fields, tmp_path)).config for name, fields in PUBLISHED.items()}
    assert configs['google/gemma-2b'].activation == 'gelu_pytorch_tanh'
    granite = configs['ibm-granite/granite-3.3-8b-instruct']
    assert (granite.input_scale, granite.residual_scale, granite.logit_scale) == (12.0, 0.22, 1 / 16)
    assert granite.attention_scale == 0.0078125
    assert len(configs['THUDM/GLM-4-9B-0414'].ropes[0].frequencies) == 2  # of the 4 pairs of a head
    assert configs['allenai/Olmo-3-1025-7B'].ropes[3].factor == 1.2079441541679836
    assert configs['mistralai/Ministral-3-3B-Base-2512'].query_growth == (0.1, 16384)
    assert configs['mistralai/Ministral-3-3B-Base-2512'].tied
    assert not configs['mistralai/Mistral-Small-3.1-24B-Instruct-2503'].tied
    assert configs['FacebookAI/xlm-roberta-base'].max_positions == 512


@pytest.mark.parametrize(
    ('name', 'changes', 'field'),
    [
        ('google/gemma-2b', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=True: expected False'),
        ('google/gemma-3-1b-it', {'sliding_window': 0}, 'sliding_window=0: expected at least 1'),
        ('ibm-granite/granite-3.3-8b-instruct', {'logits_scaling': 0.0}, r'logits_scaling=0.0: expected a number > 0'),
        ('ibm-granite/granite-3.3-8b-instruct', {'embedding_multiplier': 'x'}, 'embedding_multiplier=.x.: '),
        ('THUDM/GLM-4-9B-0414', {'partial_rotary_factor': 2.0}, 'rope_parameters=.*partial_rotary_factor: expected'),
        ('THUDM/GLM-4-9B-0414', {'partial_rotary_factor': 0.01}, 'rope_parameters=.*expected at least 1'),
        ('HuggingFaceTB/SmolLM3-3B', {'no_rope_layers': [1, 0]}, r'no_rope_layers=\[1, 0\]: expected 5 numbers'),
        ('allenai/Olmo-3-1025-7B', {'rope_scaling': {'rope_type': 'ntk'}}, 'rope_scaling: type=.ntk.: expected one of'),
        ('bigcode/starcoder2-3b', {'hidden_act': 'xielu'}, 'hidden_act=.xielu.: expected one of'),
        ('bigcode/starcoder2-3b', {'num_key_value_heads': 3}, 'num_key_value_heads=3: expected a divisor'),
        (
            'CohereLabs/c4ai-command-r7b-12-2024',
            {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0, 'partial_rotary_factor': 0.5}},
            'rope_parameters=.*expected no partial_rotary_factor',
        ),
        ('mistralai/Ministral-3-3B-Base-2512', {'quantization_config': {'quant_method': 'fp8'}}, 'quantization_config'),
        ('almanach/camembert-base', {'is_decoder': True}, 'is_decoder=True: expected False'),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(name, changes, field, tmp_path):
    with pytest.raises(UserError, match=rf'config.json: .*{field}'):
        read(PUBLISHED[name] | changes, tmp_path)


def test_mixtures_become_what_their_configs_say(tmp_path):
    configs = {name: models.build(read(fields, tmp_path)).config for name, fields in published_moe.PUBLISHED.items()}
    deepseek = configs['deepseek-ai/DeepSeek-V3']
    assert deepseek.sparse == (False, False, False, True, True)
    assert (deepseek.experts.groups, deepseek.experts.top_groups, deepseek.experts.scale) == (8, 4, 2.5)
    assert deepseek.attention_scale == pytest.approx(12**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert configs['openai/gpt-oss-20b'].windows == (128, None)
    assert configs['Qwen/Qwen3-30B-A3B'].head_dim == 16
    assert configs['ibm-granite/granite-3.1-1b-a400m-instruct'].logit_scale == 1 / 6
    eight_bits = {'quantization_config': {'quant_method': 'fp8'}}
    with pytest.raises(UserError, match="quantization_config: quant_method='fp8': expected"):
        read(published_moe.PUBLISHED['deepseek-ai/DeepSeek-V3'] | eight_bits, tmp_path)
