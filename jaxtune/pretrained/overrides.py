"""Fields of a recipe's `model.config` over the `config.json` of a loaded model: how it computes, never what it stores.

A rotary scaling may be given as `rope_parameters`, or by the older names `rope_scaling`, `rope_theta` and
`partial_rotary_factor`. One that names its type takes the place of the folder's, but for `rope_theta` and
`partial_rotary_factor`; one that does not changes the folder's.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtune import models
from jaxtune.common import console, hub
from jaxtune.common.checks import Check, ExpectedError, boolean, integer, number
from jaxtune.common.io import write_json
from jaxtune.common.jsonfile import read_object
from jaxtune.errors import UserError, shown
from jaxtune.models import Family
from jaxtune.models.fields import folder_config
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.rope import TYPES

# In an adapter's folder: the fields that its base had over those of its own folder.
NAME = 'base_config.json'

# What another key decides, or what describes the files of a folder.
_ELSEWHERE = {
    **dict.fromkeys(('dtype', 'torch_dtype'), 'model.param_dtype and model.compute_dtype'),
    **dict.fromkeys(('id2label', 'label2id', 'num_labels'), 'the labels of the data or of the folder'),
    **dict.fromkeys(('_name_or_path', 'architectures', 'auto_map', 'quantization_config'), 'no such field'),
    **dict.fromkeys(('transformers_version', 'output_attentions'), 'no such field'),
}
# Also in the tokenizer and in generation_config.json, which would say otherwise.
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
_SCALINGS, _ANY_ROPE = ('rope_parameters', 'rope_scaling'), ('rope_theta', 'partial_rotary_factor')
_ORIGINAL = 'original_max_position_embeddings'
_ROPE_KEYS = {
    'default': (),
    'linear': ('factor',),
    'dynamic': ('factor',),
    'yarn': (
        *('factor', _ORIGINAL, 'attention_factor', 'beta_fast', 'beta_slow'),
        *('mscale', 'mscale_all_dim', 'truncate'),
    ),
    'longrope': ('factor', _ORIGINAL, 'attention_factor', 'short_factor', 'long_factor'),
    'llama3': ('factor', _ORIGINAL, 'low_freq_factor', 'high_freq_factor'),
}
_NEEDED = {
    **dict.fromkeys(('linear', 'dynamic', 'yarn'), ('factor',)),
    'longrope': ('short_factor', 'long_factor'),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
}


def _numbers(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise ExpectedError('a list of numbers > 0, one for each frequency')
    return [number(above=0)(part) for part in value]


_ROPE_CHECKS: dict[str, Check] = {
    _ORIGINAL: integer(1),
    'truncate': boolean,
    'short_factor': _numbers,
    'long_factor': _numbers,
    'mscale': number(0),
    'mscale_all_dim': number(0),
}


@dataclasses.dataclass(frozen=True)
class Overridden:
    """The config fields of a folder, and with the overrides.

    Attributes:
      stored: as the folder has them, with the defaults of the family's config class.
      fields: with the overrides.
    """

    stored: Mapping[str, Any]
    fields: Mapping[str, Any]

    @property
    def changes(self) -> dict[str, Any]:
        """What differs, as it is now: the values given, and what a config class derives from them."""
        return {name: value for name, value in self.fields.items() if value != self.stored.get(name)}

    def note(self) -> None:
        """Says what was overridden."""
        if self.changes:
            words = (f'{name}: {self.stored.get(name)} -> {value}' for name, value in self.changes.items())
            console.note(f'model.config: {"; ".join(words)}')


def of_adapters(folders: Iterable[str]) -> dict[str, Any]:
    """The fields that the base of adapters had over those of its folder.

    Raises:
      UserError: it had others with one adapter than with another.
    """
    by_folder = {folder: _stored(pathlib.Path(folder)) for folder in folders}
    first = next(iter(by_folder.values()), {})
    for folder, fields in by_folder.items():
        if fields != first:
            raise UserError(
                f'{folder}: its base had {fields or "no"} fields over its config.json, that of the first adapter '
                f'{first or "none"}; expected adapters of one base'
            )
    return first


def _stored(adapter: pathlib.Path) -> dict[str, Any]:
    return read_object(adapter / NAME) if (adapter / NAME).is_file() else {}


def keep(adapter: pathlib.Path, changes: Mapping[str, Any], base: str) -> None:
    """Writes into an adapter's folder what its base had over its own config, for jaxtune and in words for others."""
    if not changes:
        return
    write_json(adapter / NAME, dict(changes))
    readme, arguments = adapter / 'README.md', ', '.join(f'{name}={value!r}' for name, value in changes.items())
    text = readme.read_text('utf-8') + '\n' if readme.is_file() else ''
    text += 'It was trained beside a base with other config fields than its folder holds:\n\n'
    readme.write_text(f'{text}    from_pretrained({base!r}, {arguments})\n', 'utf-8')
    console.note(f'to load {adapter} with PEFT, load its base with the fields of {adapter / NAME}')


def read(folder: str, layers: Sequence[Mapping[str, Any]], family: str = '') -> Overridden:
    """The config fields of a folder with overrides.

    Args:
      folder: of a model, or a hub id.
      layers: overrides, each over the one before.
      family: a recipe's `model.family`.

    Raises:
      UserError: the folder's own are wrong; or an override is unknown, impossible, or changes what is stored: names
        `model.config.KEY` and what was expected.
    """
    stored = fields = models.read_config(folder, family)
    layers = [layer for layer in layers if layer]
    if not layers:
        return Overridden(stored, stored)
    chosen = models.families(family)[stored['model_type']]
    names, aliases = _names(chosen)
    rope = stored.get('rope_parameters')
    older = {name for name in _ANY_ROPE if rope and name in rope} | ({'rope_scaling'} if rope else set())
    # As the file has them, so that what a class derives from others is derived anew.
    raw = {aliases.get(name, name): value for name, value in folder_config(hub.resolve(folder)).items()}
    raw = {'model_type': chosen.model_type, **{name: value for name, value in raw.items() if name in names}}
    read_alone = models.read_config(raw, family)
    raw |= {name: value for name, value in stored.items() if name in names and value != read_alone.get(name)}
    raw |= {'rope_parameters': rope} if rope else {}  # whose trained length more positions must not change
    for layer in layers:
        given = {aliases.get(name, name): value for name, value in layer.items()}
        _refuse(given, fields, names | older)
        before, given = fields, _with_rope(given, fields, names)

        def laid(given: Mapping[str, Any], raw: Mapping = raw, before: Mapping = before) -> dict[str, Any]:
            # What the family's class does not know stays as the folder has it.
            return {**before, **models.read_config({**raw, **given}, family)}

        fields = laid(given)
        _check_stored(before, fields, given, laid, family)
        raw = {**raw, **given}
    return Overridden(stored, fields)


def _names(family: Family) -> tuple[set[str], Mapping[str, str]]:
    """Names of a family's config fields, and other names that some of them have."""
    if family.fields is not None:
        return {*family.fields, 'bos_token_id', 'eos_token_id', 'pad_token_id', 'tie_word_embeddings'}, {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # slow to import

    config_class = CONFIG_MAPPING[family.model_type]
    aliases = config_class.attribute_map
    names = {field.name for field in dataclasses.fields(config_class)} - {'model_type'}
    return {*names, *family.unlisted, *aliases.values()}, aliases


def _refuse(given: Mapping[str, Any], fields: Mapping[str, Any], names: set[str]) -> None:
    """Refuses keys that override nothing, by name."""
    for name, value in given.items():
        if name == 'model_type':
            if value != fields['model_type']:
                raise UserError(f'model.config.model_type={shown(value)}: expected {fields["model_type"]!r}, as stored')
        elif name in _TOKENS:
            if value != fields.get(name):
                stored = fields.get(name)
                raise UserError(
                    f"model.config.{name}={shown(value)}: expected {stored}, as the folder's other files say"
                )
        elif name in _ELSEWHERE:
            raise UserError(f'model.config.{name}: is not for a model that is loaded; expected {_ELSEWHERE[name]}')
        elif name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f'; the nearest valid key is model.config.{near[0]}' if near else ''
            raise UserError(f'model.config.{name}: unknown key of model_type={fields["model_type"]}{hint}')


def _with_rope(given: Mapping[str, Any], fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The overrides, with all that they say of rotary positions as whole `rope_parameters`."""
    touched = [name for name in (*_SCALINGS, *_ANY_ROPE) if name in given]
    rest = {name: value for name, value in given.items() if name not in touched}
    if not touched:
        return rest
    scalings, now = [name for name in touched if name in _SCALINGS], fields['rope_parameters']
    if len(scalings) > 1:
        raise UserError('model.config.rope_scaling: is an older name of rope_parameters; expected one of the two')
    value: Mapping[str, Any] = {}
    if scalings:
        value = given[scalings[0]]
        value = {'rope_type': 'default'} if value in (None, {}) else _mapping(scalings[0], value)
    if 'rope_type' not in now:  # one a type of layer
        if scalings != ['rope_parameters'] or touched != scalings or not set(value) <= set(now):
            raise UserError(f'model.config.{touched[0]}: expected rope_parameters of {" and ".join(now)}')
        laid = {layer: _laid(f'rope_parameters.{layer}', now[layer], part, fields) for layer, part in value.items()}
        return rest | {'rope_parameters': {**now, **laid}}
    for name in touched:
        if name in value:
            raise UserError(f'model.config.{name}: stands in {scalings[0]} too; expected one of the two')
    theirs = {name: given[name] for name in touched if name not in scalings}
    laid = _laid(scalings[0] if scalings else '', now, {**value, **theirs}, fields)
    # Where a config has the trained length beside the scaling (Phi 3), its class lets that one win.
    beside = {_ORIGINAL: laid[_ORIGINAL]} if _ORIGINAL in names and _ORIGINAL in laid else {}
    return beside | rest | {'rope_parameters': laid}


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"model.config.{name}={shown(value)}: expected fields by name, such as {{'rope_type': 'yarn'}}")
    return value


def _laid(where: str, now: Mapping[str, Any], value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters with others over them; `where` is the name that these were given under, '' = by their own."""
    value = {name: part for name, part in _mapping(where, value).items() if part is not None}
    older = value.pop('type', None)
    named = value.pop('rope_type', older)
    if named is not None and named not in TYPES:
        raise UserError(f'model.config.{where}.rope_type={shown(named)}: expected one of {", ".join(TYPES)}')
    kind = now['rope_type'] if named is None else named
    prefix = f'model.config.{where}.' if where else 'model.config.'
    for name, part in value.items():
        known = ('rope_theta', *_ROPE_KEYS.get(kind, ()), *(() if name not in now else (name,)))
        if name not in known:
            other = '' if named else ', or the rope_type of a new scaling'
            raise UserError(f'{prefix}{name}: unknown key of rope_type={kind}; expected {", ".join(known)}{other}')
        try:
            value[name] = _ROPE_CHECKS.get(name, number(above=0))(part)
        except ExpectedError as error:
            raise UserError(f'{prefix}{name}={shown(part)}: expected {error}') from None
    if named is None or kind == now['rope_type']:
        kept = now if named is None else {name: now[name] for name in (*_ANY_ROPE, _ORIGINAL) if name in now}
    else:
        kept = {name: now[name] for name in _ANY_ROPE if name in now}
    laid = {**kept, 'rope_type': kind, **value}
    for name in _NEEDED.get(kind, ()):
        if name not in laid:
            raise UserError(f'{prefix}{name}: is missing; expected it of rope_type={kind}')
    if _ORIGINAL in _ROPE_KEYS.get(kind, ()):  # the length it was trained at, whatever max_position_embeddings becomes
        laid.setdefault(_ORIGINAL, fields['max_position_embeddings'])
    return laid


def _check_stored(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    given: Mapping[str, Any],
    laid: Callable[[Mapping[str, Any]], dict[str, Any]],
    family: str,
) -> None:
    """Refuses overrides with which the tensors of the folder would be others, or be cut into other heads."""
    model = models.build(before, family=family)
    if not (found := _differences(model, models.build(after, family=family))):
        return
    guilty = [name for name, value in given.items() if value != before.get(name)]
    for name in guilty:
        try:
            alone = _differences(model, models.build(laid({name: given[name]}), family=family))
        except UserError:  # impossible without the others
            continue
        if alone:
            guilty, found = [name], alone
            break
    keys = ', '.join(f'model.config.{name}={shown(given[name])}' for name in guilty)
    hint = ' (tokenizer.add makes rows for new tokens)' if 'vocab_size' in guilty else ''
    stored = ', '.join(shown(before.get(name)) for name in guilty)
    raise UserError(f'{keys}: {found}; expected {stored}, as the weights are stored{hint}')


def _differences(model: Model, other: Model) -> str:
    """How what a model stores differs from what another does, '' if not at all."""
    shapes, others = leaf_paths(model.shapes), leaf_paths(other.shapes)
    for path in {**shapes, **others}:
        tensor = (model if path in shapes else other).tensors[path].name
        if path not in others or path not in shapes:
            return f'a model {"without" if path in shapes else "with"} the tensor {tensor}'
        if shapes[path].shape != others[path].shape:
            mine, its = (_shape(each, path) for each in (model, other))
            return f'a model whose {tensor} is {its} where {mine} is stored'
    for name in ('num_heads', 'num_kv_heads', 'head_dim'):
        mine, its = (getattr(each.config, name, None) for each in (model, other))
        if mine != its:
            return f'a model with {name}={its} where the stored tensors have {mine}'
    return ''


def _shape(model: Model, path: str) -> list[int]:
    """A parameter's shape as a folder has it, all layers of a stack together."""
    *stack, rows, columns = (1, *leaf_paths(model.shapes)[path].shape)
    swapped = (columns, rows) if model.tensors[path].transposed else (rows, columns)
    return [*stack, *swapped][1:]
