"""Sources of data as a recipe names them: one path, or several with labels and weights.

`data.train` and `data.eval` are a path; or a mapping, label -> path or label -> `{path, weight, format, …}`; or the
text `a.jsonl:0.7,b.jsonl:0.3`, whose labels come from the files' names.
"""

import dataclasses
import difflib
import glob
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxtune.common import checks
from jaxtune.common.checks import ExpectedError

FORMATS = ('auto', 'text', 'pair', 'alpaca', 'sharegpt', 'messages', 'prompt', 'preference')
AUTO = 'auto'  # as `data.eval`: a share of `data.train`

_WEIGHT = r'[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf)'
_WEIGHTED = re.compile(rf'(.+?):({_WEIGHT})\s*(?:,|$)', re.IGNORECASE)
_LAST_WEIGHT = re.compile(rf'(.+):({_WEIGHT})', re.IGNORECASE)
_TOO_LARGE = 1e300
_FORM = 'label -> a path, or label -> path, weight, format'


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One source of a mixture.

    Attributes:
      label: the recipe's name for it; '' = the only one, given as a path.
      path: a path, glob, folder, dataset id, `python-stdlib` or `@STAGE`.
      weight: its part of the rows, beside the others' weights.
      format, text_key, source_key, target_key: instead of the recipe's; '' = as there.
    """

    label: str
    path: str
    weight: float = 1.0
    format: str = ''
    text_key: str = ''
    source_key: str = ''
    target_key: str = ''


FIELDS = tuple(field.name for field in dataclasses.fields(DataSource) if field.name != 'label')


def check(value: Any) -> str | dict[str, dict[str, Any]]:
    """A path as it is, or sources as `{label: {'path': …, 'weight': …}}`: the check of `data.train` and `data.eval`.

    Raises:
      ExpectedError: it is neither.
    """
    if isinstance(value, str):
        parts = split_text(checks.text(value))
        if parts is None:
            return checks.path(value)
        labels = _labels([path for path, _ in parts])
        value = {label: {'path': path, 'weight': weight} for label, (path, weight) in zip(labels, parts, strict=True)}
    if not isinstance(value, Mapping):
        raise ExpectedError(f'a path, or a mapping of sources ({_FORM})')
    if not value:
        raise ExpectedError(f'at least one source ({_FORM})')
    return {_label(label): _source(label, fields) for label, fields in value.items()}


def read(value: str | Mapping[str, Any]) -> tuple[DataSource, ...]:
    """The sources of a checked value by label; none of ''; a path is one without a label."""
    if isinstance(value, str):
        return (DataSource('', value),) if value else ()
    return tuple(DataSource(label, **dict(fields.items())) for label, fields in sorted(value.items()))


def words(value: Any) -> str:
    """A checked value for messages: the path, or the labels."""
    return value if isinstance(value, str) else ', '.join(value)


def split_text(text: str) -> list[tuple[str, float]] | None:
    """`(path, weight)` of the parts of `a.jsonl:0.7,b.jsonl:0.3`; None where a text is one path.

    One path is what has no comma, and what is there under its whole name. Where each part ends in `:WEIGHT`, paths may
    hold commas; else every comma separates, and a part without a weight has 1. Colons within a part (`ID:CONFIG:SPLIT`)
    belong to its path, but for the last one before a number.

    Raises:
      ExpectedError: a part is empty, or its weight is no number > 0.
    """
    if ',' not in text or _is_there(text):
        return None
    parts, at = [], 0
    while at < len(text) and (match := _WEIGHTED.match(text, at)):
        parts.append((match[1].strip(), match[2]))
        at = match.end()
    if at < len(text) or text.rstrip().endswith(',') or len(parts) < 2:
        found = [(part.strip(), _LAST_WEIGHT.fullmatch(part.strip())) for part in text.split(',')]
        parts = [(match[1], match[2]) if match else (part, '1') for part, match in found]
    if not all(path for path, _ in parts):
        raise ExpectedError('a path before and after each comma')
    return [(path, _weight(path, float(weight))) for path, weight in parts]


def _is_there(text: str) -> bool:
    try:
        path = os.path.expanduser(text)
        return os.path.lexists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))
    except (OSError, ValueError):  # no path of this machine
        return False


def _labels(paths: list[str]) -> list[str]:
    """A label of each path, made of its name; those that meet again are numbered."""
    labels: list[str] = []
    for path in paths:
        parts = [part for part in path.removeprefix('@').split('/') if part.strip('*.~')]
        names = [re.sub(r'\W+', '_', part.lstrip('.').split('.')[0]).strip('_') for part in reversed(parts)]
        name = next(filter(None, names), 'source')
        number = 1
        while (label := name if number == 1 else f'{name}_{number}') in labels:
            number += 1
        labels.append(label)
    return labels


def _label(label: Any) -> str:
    if not isinstance(label, str) or not re.fullmatch(r'[\w-]+', label):
        raise ExpectedError(f'labels of letters, digits, _ and -; found {label!r:.60}')
    return label


def _weight(name: str, weight: Any) -> float:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < _TOO_LARGE:
        raise ExpectedError(f'a weight > 0 of {name!r}; found {weight!r:.40}')
    return float(weight)


def _source(label: str, fields: Any) -> dict[str, Any]:
    """The checked fields of a source, without those that are empty."""
    given = {'path': fields} if isinstance(fields, str) else fields
    if not isinstance(given, Mapping):
        raise ExpectedError(f'a path or fields ({", ".join(FIELDS)}) of {label!r}; found {given!r:.60}')
    for name in given:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, 1)
            hint = f' (nearest: {near[0]})' if near else ''
            raise ExpectedError(f'only the fields {", ".join(FIELDS)} of {label!r}; found {name!r:.40}{hint}')
    texts = {name: given[name] for name in FIELDS if name in given and name != 'weight'}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ExpectedError(f'a text as {name} of {label!r}; found {value!r:.60}')
    if not texts.get('path'):
        raise ExpectedError(f'a path of {label!r}; found none')
    if (name := texts.get('format', '')) and name not in FORMATS:
        raise ExpectedError(f'one of {", ".join(FORMATS)} as format of {label!r}; found {name!r:.40}')
    try:
        checks.path(texts['path'])
    except ExpectedError as error:
        raise ExpectedError(f'{error}, as path of {label!r}') from None
    checked = {name: checks.text(value) for name, value in texts.items() if value}
    return {**checked, 'weight': _weight(label, given.get('weight', 1.0))}
