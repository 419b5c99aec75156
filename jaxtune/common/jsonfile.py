"""JSON files of the user, with the shape of their content checked."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtune.common.checks import Check, ExpectedError
from jaxtune.errors import UserError, reason, shown


def read_object(path: pathlib.Path, fields: Mapping[str, Check] | None = None, missing: str = '') -> dict[str, Any]:
    """The object that a file holds.

    Args:
      path: the file.
      fields: checks of some of its fields, if they are present and not null.
      missing: the message if there is no such file.

    Raises:
      UserError: names the file, and the field or the line, and what was expected.
    """
    try:
        if not path.is_file():  # nor a folder, nor a pipe that would be waited for
            raise UserError(f'{path}: {"expected a file" if path.exists() else missing or "no such file"}')
        text = path.read_text('utf-8')
        value = json.loads(text)
        if '\\ud' in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f'{path}: expected text; it holds half of a surrogate pair') from None
    except RecursionError:
        raise UserError(f'{path}: expected JSON that is nested less deeply') from None
    except ValueError as error:  # bytes that are no UTF-8, no JSON, or a number of thousands of digits
        raise UserError(f'{path}:{getattr(error, "lineno", 1)}: not valid JSON: {reason(error)}') from None
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path}:1: expected a JSON object')
    for name, check in (fields or {}).items():
        if value.get(name) is not None:
            try:
                value[name] = check(value[name])
            except ExpectedError as error:
                raise UserError(f'{path}: {name}={shown(value[name])}: expected {error}') from None
    return value


def texts(value: Any) -> list[str]:
    """A list of texts."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ExpectedError('a list of texts')
    return value


def token_ids(value: Any) -> int | list[int]:
    """A token's id, or several."""
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and -1 <= i < 2**31 for i in ids):
        raise ExpectedError('a token id or a list of them')
    return value


def ids_by_name(value: Any) -> list[int] | dict[str, list[int]]:
    """A list of token ids, or lists of them by name; none is empty."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    for ids in lists:
        if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i < 2**31 for i in ids):
            raise ExpectedError('a list of token ids, or one by the name of a module')
    return value


def numbers_by_name(value: Any) -> dict[str, float]:
    """Finite numbers by name."""
    good = isinstance(value, dict) and all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        for number in value.values()
    )
    if not good:
        raise ExpectedError('numbers by name')
    return value
