"""The fields of an adapter's config in PEFT's format: which are read, which are harmless, which cannot be honoured."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtune.common import checks
from jaxtune.common.jsonfile import ids_by_name, numbers_by_name, texts
from jaxtune.errors import UserError, shown

# What fields must be where they are there and not null, and those that there must be.
FIELDS = {
    'alpha_pattern': numbers_by_name,
    'base_model_name_or_path': checks.text,
    'bias': checks.text,
    'ensure_weight_tying': checks.boolean,
    'lora_alpha': checks.number(),
    'lora_dropout': checks.number(0, 1),
    'num_virtual_tokens': checks.integer(1),
    'peft_type': checks.text,
    'r': checks.integer(1),
    'rank_pattern': numbers_by_name,
    'target_parameters': texts,
    'trainable_token_indices': ids_by_name,
    'use_dora': checks.boolean,
    'use_rslora': checks.boolean,
}
NEEDED = {'LORA': ('lora_alpha',), 'PROMPT_TUNING': ('num_virtual_tokens',)}
# Fields of PEFT's LoRA that change what is computed and are not built here; each is fine while it is empty.
_UNSUPPORTED = (
    'alora_invocation_tokens', 'arrow_config', 'kasa_config', 'layer_replication', 'lora_bias', 'megatron_config',
    'monteclora_config', 'use_bdlora', 'use_qalora',
)  # fmt: skip
# Those that are read, and those that say how an adapter was made or trained: its tensors say what came of it.
_KNOWN = (
    'alpha_pattern', 'auto_mapping', 'corda_config', 'ensure_weight_tying', 'eva_config', 'exclude_modules',
    'fan_in_fan_out', 'inference_mode', 'init_lora_weights', 'layers_pattern', 'layers_to_transform', 'loftq_config',
    'lora_ga_config', 'modules_to_save', 'rank_pattern', 'runtime_config', 'target_modules', 'target_parameters',
    'trainable_token_indices', 'use_dora', 'use_rslora', 'velora_config',
)  # fmt: skip
# How factors may have begun so that the base stays as it is, or that its rest can be made again from it.
_BEGINNINGS = (True, False, None, 'eva', 'gaussian', 'mica', 'olora', 'orthogonal', 'pissa')


def check_lora(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses a LoRA whose config asks for what is not built here.

    Args:
      path: of the config, for messages.
      config: its fields.

    Raises:
      UserError: names the field.
    """
    for name in _UNSUPPORTED:
        if config.get(name):
            raise UserError(f'{path}: {name}={shown(config[name])}: not in this version; expected it to be empty')
    for name, value in config.items():
        if name not in _KNOWN and (value is True or (isinstance(value, dict | list) and value)):
            raise UserError(f'{path}: {name}={shown(value)}: not known to this version; expected it to be empty')
    beginning = config.get('init_lora_weights', True)
    if beginning not in _BEGINNINGS:
        raise UserError(
            f'{path}: init_lora_weights={shown(beginning)}: training began with other base weights, which cannot be '
            'made again; expected an adapter that was converted to plain LoRA (save_pretrained with '
            'path_initial_model_for_weight_conversion), or one of true, false, '
            + ', '.join(name for name in _BEGINNINGS if isinstance(name, str))
        )
    if config.get('bias', 'none') != 'none':
        raise UserError(f"{path}: bias={shown(config['bias'])}: not in this version; expected 'none'")
