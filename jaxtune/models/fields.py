"""Hugging Face config fields, read through `transformers`' config classes so that defaults are theirs; written back."""

import copy
import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from jaxtune.common import hub
from jaxtune.common.checks import Check, ExpectedError, boolean, integer, number, text
from jaxtune.common.jsonfile import read_object, texts, token_ids
from jaxtune.errors import UserError, reason, shown
from jaxtune.models.rope import TYPES

if TYPE_CHECKING:
    from jaxtune.models import Family

Fields = Mapping[str, Any]

# Older names of fields, which the config classes turn into today's.
_LEGACY = ('rope_theta', 'rope_scaling', 'torch_dtype', 'num_labels', 'partial_rotary_factor')
# Names that fields had before `transformers` 5, and that other programs look for.
_OLDER = {'num_local_experts': 'num_experts'}
# What every config may say, though not every class lists it.
_COMMON = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id', 'tie_word_embeddings')
# Families with rotary parameters by layer type, whose older names are those of layers without a window.
_ROPES_BY_TYPE = ('gemma3_text', 'olmo3')
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

# Models that read images too: their language model's fields are under `text_config`, of this type if it names none.
_LANGUAGE_MODELS = {'gemma3': 'gemma3_text', 'mistral3': 'mistral'}
# What such a folder says of both: it counts for the language model.
_SHARED = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'tie_word_embeddings', 'id2label', 'label2id')

_size, _layers, _scale = integer(1), integer(1, high=10_000), number(0)


def _mapping(value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise ExpectedError('fields by name')
    return value


# What a field must be where a config class has it and it is not null.
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(('n_layer', 'n_layers', 'num_decoder_layers', 'num_hidden_layers', 'num_layers'), _layers),
    **dict.fromkeys(('d_ff', 'd_kv', 'd_model', 'dim', 'embedding_size', 'global_attn_every_n_layers'), _size),
    **dict.fromkeys(('head_dim', 'hidden_dim', 'hidden_size', 'intermediate_size', 'local_attention'), _size),
    **dict.fromkeys(('max_position_embeddings', 'n_embd', 'n_head', 'n_heads', 'n_inner', 'n_positions'), _size),
    **dict.fromkeys(('num_attention_heads', 'num_heads', 'num_hidden_groups', 'num_key_value_heads'), _size),
    **dict.fromkeys(('relative_attention_max_distance', 'relative_attention_num_buckets', 'vocab_size'), _size),
    **dict.fromkeys(('initializer_factor', 'initializer_range', 'layer_norm_eps', 'layer_norm_epsilon'), _scale),
    **dict.fromkeys(('norm_eps', 'norm_epsilon', 'rms_norm_eps'), _scale),
    **dict.fromkeys(('attn_logit_softcapping', 'final_logit_softcapping', 'query_pre_attn_scalar'), number(above=0)),
    **dict.fromkeys(('activation', 'activation_function', 'dense_act_fn', 'hidden_act', 'hidden_activation'), text),
    **dict.fromkeys(('bos_token_id', 'decoder_start_token_id', 'eos_token_id', 'pad_token_id'), token_ids),
    **dict.fromkeys(('attention_multiplier', 'embedding_multiplier', 'logit_scale', 'residual_multiplier'), number()),
    'layer_types': texts,
    'logits_scaling': number(above=0),
    'rope_parameters': _mapping,
    'type_vocab_size': integer(0),
}


# What a field of a family's own must be, by the type of its default.
_CHECK_OF_TYPE: dict[type, Check] = {bool: boolean, int: integer(), float: number(), str: text}


class FieldError(ValueError):
    """A config field is impossible: its name, and what was expected."""

    def __init__(self, name: str, expected: str) -> None:
        super().__init__(f'{name}: {expected}')
        self.name, self.expected = name, expected


def refuse_model_type(where: str, model_type: Any, known: Collection[str]) -> UserError:
    """What to say of a `model_type` that no family has."""
    near = difflib.get_close_matches(str(model_type), known, 1)
    hint = f' (nearest: {near[0]})' if near else ''
    return UserError(
        f'{where}model_type={shown(model_type)}: expected one of {", ".join(known)}{hint}, or model.family=module:NAME '
        'of your own family'
    )


def read_fields(
    source: str | Fields, families: 'Mapping[str, Family]', check: 'Callable[[Family, Fields], Any]'
) -> dict[str, Any]:
    """All config fields of a folder, a hub id, or of a recipe's `model.config`.

    Args:
      source: where from.
      families: the known ones, by `model_type`.
      check: raises `FieldError` for values that the model cannot have.

    Raises:
      UserError: names the key (`model.config.KEY`, or the file and its key) and what was expected.
    """
    if isinstance(source, Mapping):
        given, where = copy.deepcopy(dict(source)), 'model.config.'
    else:
        path = hub.resolve(str(source)) / 'config.json'
        given, where = folder_config(path.parent), f'{path}: '
        given, where = _language_model(given, where)
    model_type = given.get('model_type')
    family = families.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise refuse_model_type(where, model_type, families)
    if quantisation := given.pop('quantization_config', None):
        method = quantisation.get('quant_method') if isinstance(quantisation, Mapping) else quantisation
        if method != 'mxfp4' or isinstance(source, Mapping):  # which is read as what it stands for
            raise UserError(
                f'{where}quantization_config: quant_method={shown(method)}: expected a model that is not quantised, or '
                'a folder of mxfp4'
            )

    _check_rope_type(given, where)

    strict = isinstance(source, Mapping)
    if family.fields is None:
        fields = _read_by_class(given, where, strict, family.unlisted)
    else:
        fields = _read_by_defaults(family.fields, given, where, strict)
    for name in (*_DROPPED, *(name for name in ('id2label', 'label2id') if name not in given)):
        fields.pop(name, None)
    name = ''
    try:
        for name, expects in _CHECKS.items():
            if fields.get(name) is not None:
                expects(fields[name])
        check(family, fields)
    except ExpectedError as error:
        raise UserError(f'{where}{name}={shown(fields[name])}: expected {error}') from None
    except FieldError as error:
        raise UserError(f'{where}{error.name}={shown(fields.get(error.name))}: {error.expected}') from None
    return fields


def folder_config(folder: pathlib.Path) -> dict[str, Any]:
    """`config.json` of a model folder as it is written there.

    Raises:
      UserError: there is none, or it is no object, or names no class by texts.
    """
    missing = 'no such file; expected a Hugging Face model folder'
    return read_object(folder / 'config.json', {'architectures': texts, 'model_type': text}, missing)


def _language_model(given: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The fields of a folder's language model, and where they are; they may be all of the folder's."""
    model_type = given.get('model_type')
    if not isinstance(model_type, str) or model_type not in _LANGUAGE_MODELS:
        return given, where
    inner = given.get('text_config') or {}
    if not isinstance(inner, Mapping):
        raise UserError(f'{where}text_config={shown(inner)}: expected fields by name')
    outer = {name: given[name] for name in (*_SHARED, 'quantization_config') if given.get(name) is not None}
    return {'model_type': _LANGUAGE_MODELS[model_type], **inner, **outer}, f'{where}text_config.'


def _check_rope_type(given: Fields, where: str) -> None:
    """Names a rotary type that is not known here, before a config class blames what it makes of it."""
    for name in ('rope_scaling', 'rope_parameters'):
        rope = given.get(name)
        by_layer = rope.values() if isinstance(rope, Mapping) else ()
        for part in (rope, *by_layer):
            kind = part.get('rope_type', part.get('type')) if isinstance(part, Mapping) else None
            if kind is not None and kind not in TYPES:
                hint = " ('su' is an older name of longrope)" if kind == 'su' else ''
                raise UserError(f'{where}{name}: type={shown(kind)}: expected one of {", ".join(TYPES)}{hint}')


def _read_by_class(given: Fields, where: str, strict: bool, unlisted: tuple[str, ...]) -> dict[str, Any]:
    """All fields by the config class that `transformers` has for the model type; `strict` refuses others."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    model_type = given['model_type']
    if model_type not in CONFIG_MAPPING:
        raise UserError(f'model.family: transformers knows no model_type={model_type}; expected a Family with `fields`')
    config_class = CONFIG_MAPPING[model_type]
    if strict:
        names = {field.name for field in dataclasses.fields(config_class)}
        aliases = (
            config_class.attribute_map
        )  # whose values need not be fields: Qwen 3's `num_experts` is kept by another
        _refuse_unknown(given, names | {*aliases, *aliases.values(), *_LEGACY, *unlisted})
    values = _values(given)
    try:
        return config_class(**values).to_dict()
    except Exception as error:  # each config class raises what it likes
        said, words = reason(error), str(error)
        match = re.search(r"field '(\w+)'", words)
        key = match[1] if match else next((name for name in values if re.search(rf'\b{re.escape(name)}\b', words)), '')
        name = f'{where}{key}={shown(values[key])}' if key in values else where.rstrip('.: ')
        raise UserError(f'{name}: {said}') from None


def _read_by_defaults(defaults: Fields, given: Fields, where: str, strict: bool) -> dict[str, Any]:
    """All fields by a family's own defaults, whose types are those of the fields; `strict` refuses others."""
    if strict:
        _refuse_unknown(given, set(defaults))
    values = _values(given)
    for name, value in values.items():
        expects = _CHECK_OF_TYPE.get(type(defaults.get(name)))
        try:
            if expects is not None and value is not None:
                values[name] = expects(value)
        except ExpectedError as error:
            raise UserError(f'{where}{name}={shown(value)}: expected {error}') from None
    common = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
    return {**common, 'tie_word_embeddings': False, **_plain(defaults), **values, 'model_type': given['model_type']}


def _values(given: Fields) -> dict[str, Any]:
    """What describes the model, in the types of JSON."""
    return {name: _plain(value) for name, value in given.items() if name != 'model_type' and name not in _DROPPED}


def _refuse_unknown(given: Fields, names: set[str]) -> None:
    """A recipe's misspelt key would otherwise leave the default in place without a word."""
    known = names | {*_COMMON, 'model_type'}
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


def config_json(fields: Fields, architecture: str, dtype: str) -> str:
    """The text of `config.json`, with fields under their names before `transformers` 5 too."""
    import transformers  # slow to import

    rope, legacy = fields.get('rope_parameters'), {}
    if fields.get('model_type') in _ROPES_BY_TYPE and isinstance(rope, Mapping):
        local, rope = rope.get('sliding_attention'), rope.get('full_attention')
        if isinstance(local, Mapping) and 'rope_theta' in local and fields['model_type'] == 'gemma3_text':
            legacy['rope_local_base_freq'] = local['rope_theta']
    if isinstance(rope, Mapping) and 'rope_theta' in rope:
        legacy['rope_theta'] = rope['rope_theta']
        if rope.get('rope_type', 'default') != 'default':
            legacy['rope_scaling'] = {name: value for name, value in rope.items() if name != 'rope_theta'}
        if 'partial_rotary_factor' in rope:
            legacy['partial_rotary_factor'] = rope['partial_rotary_factor']
    values = {
        **legacy,
        **{older: fields[name] for name, older in _OLDER.items() if name in fields},
        **fields,
        'architectures': [architecture],
        'dtype': dtype,
        'transformers_version': transformers.__version__,
    }
    return json.dumps(values, indent=2, sort_keys=True) + '\n'
