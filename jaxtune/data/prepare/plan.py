"""What a recipe asks of preparation: its sources and steps, checked, as plain values that travel to the workers."""

import dataclasses
import difflib
import functools
import importlib.util
import types
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError

KINDS = ('auto', 'text', 'web', 'books', 'code', 'wikipedia')
PRESETS = ('', 'none', 'auto', 'web', 'books', 'code', 'zh')
RECORDS = ('pair', 'alpaca', 'sharegpt', 'messages', 'prompt', 'preference')
INSTALL = "pip install 'jaxtune[data]'"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
      label: the recipe's name for it.
      path: a path, glob, folder, fsspec URL, dataset id or `python-stdlib`.
      kind: how it is read: one of `KINDS`.
      weight: how often each document is in the training set; a fraction keeps that share of them.
      preset: quality rules, instead of the recipe's; '' = the recipe's.
      language: what its documents are in; '' = looked at.
      text_key: field of a record that holds the text; '' = the recipe's.
    """

    label: str
    path: str
    kind: str = 'auto'
    weight: float = 1.0
    preset: str = ''
    language: str = ''
    text_key: str = ''

    @property
    def key(self) -> str:
        """The key of the recipe, for messages."""
        return f'data.sources.{self.label}'


_FIELDS = {field.name: field.default for field in dataclasses.fields(Source) if field.name != 'label'}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the workers need to know.

    Attributes:
      sources: in the order of their labels.
      steps: `data.steps.*` without that prefix -> value.
      format: of what is made: `text` (tokens) or one of `RECORDS` (records).
      tokenizer: `tokenizer.path`; '' = train one.
      keys: the other keys of `data` that matter: `text_key`, `min_chars`, `eval_fraction`, `vocab_size`, `append_eos`.
      custom_steps: `data.custom_steps`.
      empty: paths of the sources that hold nothing.
      added: `tokenizer.add`: name and description of tokens that the tokenizer gets.
    """

    sources: tuple[Source, ...]
    steps: Mapping[str, Any]
    format: str
    tokenizer: str
    keys: Mapping[str, Any]
    custom_steps: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    added: tuple[tuple[str, str], ...] = ()

    @property
    def records(self) -> bool:
        """Whether records are made, not tokens."""
        return self.format in RECORDS

    @functools.cached_property
    def settings(self) -> Settings:
        """The keys and steps as the steps read them: `settings.min_chars`, `settings.steps.dedup.near`."""
        return _tree({**self.keys, **{f'steps.{name}': value for name, value in self.steps.items()}})


def _tree(values: Mapping[str, Any]) -> Any:
    inner: dict[str, dict[str, Any]] = {}
    tree = types.SimpleNamespace()
    for name, value in values.items():
        first, _, rest = name.partition('.')
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            setattr(tree, first, value)
    for name, below in inner.items():
        setattr(tree, name, _tree(below))
    return tree


def needed(data: Settings, defaults: Settings) -> bool:
    """Whether a recipe asks for more than `streaming` has: steps, other kinds of sources, engines, records.

    Args:
      data: the recipe's `data`.
      defaults: what it is where nothing is asked for.
    """
    structured = any(not isinstance(source, str) for source in data.sources.values())
    steps = bool(data.custom_steps) or flat(data.steps) != flat(defaults.steps)
    return structured or steps or data.engine != 'local' or data.format in RECORDS


def flat(node: Mapping[str, Any] | ConfigDict, prefix: str = '') -> dict[str, Any]:
    """`{'dedup.near': 0.8, ...}`."""
    flattened = {}
    for name, value in node.items():
        if isinstance(value, Mapping | ConfigDict):
            flattened |= flat(value, f'{prefix}{name}.')
        else:
            flattened[f'{prefix}{name}'] = value
    return flattened


def check_installed(engine: str) -> None:
    """Refuses a recipe whose packages are not there.

    Args:
      engine: `data.engine`.

    Raises:
      UserError: with the command that installs them.
    """
    missing = [name for name in ('datatrove', 'ftfy', 'trafilatura', 'warcio', 'xxhash') if not _installed(name)]
    if missing:
        raise UserError(f'data.sources, data.steps: need {", ".join(missing)}, which is not installed: {INSTALL}')
    if engine == 'ray' and not _installed('ray'):
        raise UserError("data.engine='ray': needs ray, which is not installed: pip install 'jaxtune[ray]'")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def make(data: Settings, tokenizer: str, added: tuple[tuple[str, str], ...] = ()) -> Plan:
    """Reads a recipe.

    Args:
      data: its `data`.
      tokenizer: its `tokenizer.path`.
      added: its `tokenizer.add`.

    Raises:
      UserError: an unknown field of a source, or an impossible value, with the key.
    """
    if data.train:
        sources = (Source('data', data.train),)
    else:
        sources = tuple(_source(label, value) for label, value in sorted(data.sources.items()))
    if not sources:
        raise UserError("data.train='': expected a path, a glob, a folder, a dataset id or python-stdlib")
    keys = {name: getattr(data, name) for name in _KEYS}
    form = data.format if data.format in RECORDS else 'text'
    steps: dict[str, Any] = {
        name: _texts(value) if name in _TUPLES else value for name, value in flat(data.steps).items()
    }
    if 0 < (length := steps['dedup.substring']) < _SHORTEST:
        raise UserError(f'data.steps.dedup.substring={length}: expected 0 (off) or at least {_SHORTEST} words')
    custom_steps = tuple(filter(None, _texts(data.custom_steps)))
    return Plan(sources, steps, form, tokenizer, keys, custom_steps, added=added)


_KEYS = ('text_key', 'min_chars', 'eval_fraction', 'vocab_size', 'append_eos')
_SHORTEST = 10  # fewer words in a row are language, not a copy
_TUPLES = ('language.keep', 'decontaminate.against', 'tokenizer.special_tokens')


def _texts(value: Any) -> tuple[str, ...]:
    """A text as a tuple of one, or several without empty ones."""
    return (value,) if isinstance(value, str) else tuple(part for part in value if part)


def _source(label: str, value: Any) -> Source:
    key = f'data.sources.{label}'
    if isinstance(value, str):
        return Source(label, value)
    if not isinstance(value, Mapping | ConfigDict):
        raise UserError(f'{key}={value!r}: expected a path, a glob, a folder or a dataset id, or fields of a source')
    fields = dict(value.items())
    for name in fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1, 0.6)
            hint = f'; the nearest valid key is {key}.{near[0]}' if near else f'; expected one of {", ".join(_FIELDS)}'
            raise UserError(f'{key}.{name}: unknown key{hint}')
    if not isinstance(fields.get('path'), str) or not fields['path']:
        raise UserError(f'{key}.path={fields.get("path", "")!r}: expected a path, a glob, a folder or a dataset id')
    for name, allowed in (('kind', KINDS), ('preset', PRESETS)):
        if (given := fields.get(name, allowed[0])) not in allowed:
            near = difflib.get_close_matches(str(given), allowed, 1)
            hint = f' (nearest: {near[0]})' if near else ''
            raise UserError(f'{key}.{name}={given!r}: expected one of {", ".join(filter(None, allowed))}{hint}')
    weight = fields.get('weight', 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise UserError(f'{key}.weight={weight!r}: expected a number > 0')
    for name in ('language', 'text_key'):
        if not isinstance(fields.get(name, ''), str):
            raise UserError(f'{key}.{name}={fields[name]!r}: expected a text')
    return Source(label, **{**fields, 'weight': float(weight)})
