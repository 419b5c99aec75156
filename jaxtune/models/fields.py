"""Hugging Face config fields, read through `transformers`' config classes so that defaults are theirs; written back."""

import copy
import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxtune.errors import UserError
from jaxtune.models import hub

Fields = Mapping[str, Any]

# Older names of fields, which the config classes turn into today's.
_LEGACY = ('rope_theta', 'rope_scaling', 'torch_dtype', 'num_labels', 'partial_rotary_factor')
# What every config may say, though not every class lists it.
_COMMON = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id', 'tie_word_embeddings')
# What describes a folder rather than a model. `auto_map` names code inside a folder, which is never run.
_DROPPED = (
    '_name_or_path',
    'transformers_version',
    'dtype',
    'torch_dtype',
    'architectures',
    'auto_map',
    'output_attentions',
)


class FieldError(ValueError):
    """A config field is impossible: its name, and what was expected."""

    def __init__(self, name: str, expected: str):
        super().__init__(f'{name}: {expected}')
        self.name, self.expected = name, expected


def read_fields(source: str | Fields, model_types: Collection[str], check: Callable[[Fields], Any]) -> dict[str, Any]:
    """All config fields of a folder, a hub id, or of a recipe's `model.config`.

    Args:
      source: where from.
      model_types: the known ones.
      check: raises `FieldError` for values that the model cannot have.

    Raises:
      UserError: names the key (`model.config.KEY`, or the file and its key) and what was expected.
    """
    if isinstance(source, Mapping):
        given, where = copy.deepcopy(dict(source)), 'model.config.'
    else:
        path = hub.resolve(str(source)) / 'config.json'
        given, where = _read_json(path), f'{path}: '
    model_type = given.get('model_type')
    if model_type not in model_types:
        near = difflib.get_close_matches(str(model_type), model_types, 1)
        hint = f' (nearest: {near[0]})' if near else ''
        raise UserError(f'{where}model_type={model_type!r}: expected one of {", ".join(model_types)}{hint}')
    if given.get('quantization_config'):
        raise UserError(f'{where}quantization_config: expected a model that is not quantised')

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    config_class = CONFIG_MAPPING[model_type]
    if isinstance(source, Mapping):
        _refuse_unknown(given, config_class)
    values = {name: _plain(value) for name, value in given.items() if name != 'model_type' and name not in _DROPPED}
    try:
        fields = config_class(**values).to_dict()
    except Exception as error:  # each config class raises what it likes
        text = ' '.join(str(error).split())
        found = re.search(r"field '(\w+)'", text)
        key = found[1] if found else next((name for name in values if re.search(rf'\b{name}\b', text)), '')
        name = f'{where}{key}={values[key]!r}' if key in values else where.rstrip('.: ')
        raise UserError(f'{name}: {text}') from None
    for name in (*_DROPPED, *(name for name in ('id2label', 'label2id') if name not in given)):
        fields.pop(name, None)
    try:
        check(fields)
    except FieldError as error:
        raise UserError(f'{where}{error.name}={fields.get(error.name)!r}: {error.expected}') from None
    return fields


def _refuse_unknown(given: Fields, config_class: type) -> None:
    """A recipe's misspelt key would otherwise leave the default in place without a word."""
    known = {field.name for field in dataclasses.fields(config_class)}
    known |= {*config_class.attribute_map, *_LEGACY, *_COMMON, 'model_type'}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f'; the nearest valid key is model.config.{near[0]}' if near else ''
            raise UserError(f'model.config.{name}: unknown key of model_type={given["model_type"]}{hint}')


def _plain(value: Any) -> Any:
    """Recipes carry tuples where config classes ask for lists."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f'{path}: no such file; expected a Hugging Face model folder')
    try:
        value = json.loads(path.read_text('utf-8'))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f'{path}:{getattr(error, "lineno", 1)}: not valid JSON: {error}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path}:1: expected a JSON object')
    return value


def config_json(fields: Fields, architecture: str, dtype: str) -> str:
    """The text of `config.json`, with rotary fields under their names before `transformers` 5 too."""
    import transformers

    rope = fields.get('rope_parameters')
    legacy = {}
    if isinstance(rope, Mapping) and 'rope_theta' in rope:
        legacy['rope_theta'] = rope['rope_theta']
        if rope.get('rope_type', 'default') != 'default':
            legacy['rope_scaling'] = {name: value for name, value in rope.items() if name != 'rope_theta'}
        if 'partial_rotary_factor' in rope:
            legacy['partial_rotary_factor'] = rope['partial_rotary_factor']
    values = {
        **legacy,
        **fields,
        'architectures': [architecture],
        'dtype': dtype,
        'transformers_version': transformers.__version__,
    }
    return json.dumps(values, indent=2, sort_keys=True) + '\n'
