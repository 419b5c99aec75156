"""Checks of the values of a recipe: functions that return the value, normalised, or raise what was expected."""

import ast
import contextlib
import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtune.common import paths

MOST = 2**31 - 1  # largest count, which fits in an int32


class ExpectedError(ValueError):
    """A value is impossible; the text says what was expected."""


Check = Callable[[Any], Any]


def one_of(*names: str) -> Check:
    """One of these texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ExpectedError(f'one of {", ".join(name or "(empty)" for name in names)}{_nearest(value, names)}')
        return value

    return check


def one_or_several(*words: str, names: str) -> Check:
    """One of these words, or some of the names that a mapping has, with commas between them.

    Args:
      words: that stand alone.
      names: `module:ATTRIBUTE` of the mapping, which is imported when a value is checked.
    """
    module, _, attribute = names.partition(':')

    def check(value: Any) -> str:
        if isinstance(value, str) and value in words:
            return value
        known = list(getattr(importlib.import_module(module), attribute))
        given = [part.strip() for part in value.split(',')] if isinstance(value, str) else []
        wrong = [part for part in given if part not in known]
        if not given or wrong:
            near = _nearest(wrong[0] if wrong else value, [*words, *known])
            raise ExpectedError(
                f'one of {", ".join(words)}, or some of {", ".join(known)} with commas between them{near}'
            )
        return ','.join(given)

    return check


def _nearest(value: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else ()
    return f' (nearest: {near[0]})' if near else ''


def plugin(*choices: str) -> Check:
    """A plug-in that is shipped, or `module:NAME` or `file.py:NAME` of one that is not.

    Args:
      choices: `module:ATTRIBUTE` of a `Registry`, which is imported when a value is checked, so that the schema needs
        none of the rooms above it; or a further name that is accepted.
    """

    def check(value: Any) -> str:
        names: list[str] = []
        for choice in choices:
            module, _, attribute = choice.partition(':')
            names += getattr(importlib.import_module(module), attribute).names if attribute else [choice]
        if isinstance(value, str):
            place, _, attribute = value.rpartition(':')
            if value in names or (place and attribute.isidentifier() and path(place)):
                return value
        shown = ', '.join(name or '(empty)' for name in names)
        raise ExpectedError(f'one of {shown}, or module:NAME of your own{_nearest(value, names)}')

    return check


def integer(low: int | None = None, *words: str, high: int = MOST) -> Check:
    """An integer, also as text or as a whole float.

    Args:
      low: the smallest.
      words: texts that are accepted too.
      high: the largest, and of negative ones the largest in size.
    """
    expected = 'an integer' + ('' if low is None else f' >= {low}')
    expected += ''.join(f" or '{word}'" for word in words)
    bounded = expected + (' and' if low is not None else '') + f' <= {high}'

    def check(value: Any) -> int | str:
        if isinstance(value, str) and value in words:
            return value
        if isinstance(value, str) and re.fullmatch(r'[+-]?\d{1,30}', value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ExpectedError(expected)
        if low is not None and value < low:
            raise ExpectedError(expected)
        if value > high or value < -high:
            raise ExpectedError(bounded)
        return value

    return check


def number(low: float | None = None, high: float | None = None, *words: str, above: float | None = None) -> Check:
    """A finite number.

    Args:
      low: the smallest.
      high: the largest.
      words: texts that are accepted too.
      above: it must be larger than this.
    """
    expected = 'a number' + ''.join(
        f' {sign} {bound:g}' for sign, bound in (('>=', low), ('>', above), ('<=', high)) if bound is not None
    )
    expected += ''.join(f" or '{word}'" for word in words)

    def check(value: Any) -> float | str:
        if isinstance(value, str) and value in words:
            return value
        if words and isinstance(value, str):  # a flag's, whose default is a word
            try:
                value = float(value)
            except ValueError:
                raise ExpectedError(expected) from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpectedError(expected)
        try:
            value = float(value)
        except OverflowError:  # an integer beyond the largest float
            raise ExpectedError(expected) from None
        outside = (low is not None and value < low) or (high is not None and value > high)
        if outside or (above is not None and value <= above):
            raise ExpectedError(expected)
        if not math.isfinite(value):
            raise ExpectedError(expected.replace('number', 'finite number'))
        return value

    return check


def boolean(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ExpectedError('True or False')
    return value


def text(value: Any) -> str:
    """A text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ExpectedError('a text')
    if not _encodes(value):
        raise ExpectedError('text that UTF-8 can hold, without halves of surrogate pairs')
    return value


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def pattern(value: Any) -> str:
    """A regular expression."""
    try:
        re.compile(text(value))
    except (re.error, RecursionError, OverflowError) as error:
        raise ExpectedError(f'a regular expression ({error})') from None
    return value


def path(value: Any) -> str:
    """A path of this machine, a hub id or @STAGE; it need not exist."""
    if problem := paths.wrong(text(value)):
        raise ExpectedError(problem)
    return value


def path_list(value: Any) -> str:
    """Paths, separated by commas."""
    for part in text(value).split(','):
        path(part.strip())
    return value


def path_names(value: Any) -> str | tuple[str, ...]:
    """A path, or several of them."""
    value = names(value)
    for part in (value,) if isinstance(value, str) else value:
        path(part)
    return value


def template(value: Any) -> str:
    """A name, a path, or a Jinja text."""
    return text(value) if isinstance(value, str) and '{' in value else path(value)


def names(value: Any) -> str | tuple[str, ...]:
    """A text, or several of them, also written as a Python tuple or list."""
    expected = "a name or a tuple of names such as ('q_proj','v_proj')"
    if isinstance(value, str) and value[:1] in '([':
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ExpectedError(expected) from None
    if isinstance(value, str):
        return text(value)
    if not isinstance(value, tuple | list) or not all(isinstance(name, str) and _encodes(name) for name in value):
        raise ExpectedError(expected)
    return tuple(value)


def names_if_any(value: Any) -> str | tuple[str, ...]:
    """As `names`, or none of them."""
    if value is None or (isinstance(value, str | tuple | list) and not value):
        return ''
    return names(value)


def counts(value: Any) -> tuple[int, ...]:
    """Positive integers: one, several, or a text with commas; none of them for an empty one."""
    parts = value.split(',') if isinstance(value, str) else value if isinstance(value, tuple | list) else (value,)
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    check = integer(1, high=2**24)
    try:
        return tuple(check(part) for part in parts if part != '')
    except ExpectedError:
        raise ExpectedError('positive integers with commas between them, such as 2048,8192') from None


def described(value: Any) -> tuple[tuple[str, str], ...]:
    """Names with descriptions: a text with commas, several names, or a mapping; as pairs, '' where there is none."""
    expected = "names such as '<a>,<b>' or ('<a>', '<b>'), or a mapping of each to a description; each once"
    if isinstance(value, str) and value[:1] in '([{' and value[-1:] in ')]}':
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(value)
    if isinstance(value, str):
        value = [name.strip() for name in value.split(',')] if value.strip() else ()
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, tuple | list):
        raise ExpectedError(expected)
    pairs = [pair if isinstance(pair, tuple | list) else (pair, '') for pair in value]
    good = all(len(pair) == 2 and all(isinstance(part, str) for part in pair) and pair[0].strip() for pair in pairs)
    if not good or len({pair[0] for pair in pairs}) < len(pairs):
        raise ExpectedError(expected)
    return tuple((text(name), text(description)) for name, description in pairs)


def layers(value: Any) -> str | tuple[int, ...]:
    """`all`, `4:8`, or the numbers of the layers."""
    if isinstance(value, str) and (value == 'all' or re.fullmatch(r'\d{0,9}:\d{0,9}', value)):
        return value
    if isinstance(value, tuple | list) and value and all(isinstance(i, int) and 0 <= i <= MOST for i in value):
        return tuple(value)
    raise ExpectedError("'all', a range such as '4:8', or a tuple of layer numbers")


def updates(value: Any) -> str:
    """`''`, or `10:15`: the numbers of the first and of the last update, both included."""
    match = re.fullmatch(r'([1-9]\d{0,9}):([1-9]\d{0,9})', value) if isinstance(value, str) else None
    if value == '' or (match and int(match[1]) <= int(match[2])):
        return value
    raise ExpectedError("the first and the last update, counted from 1, such as '10:15'; or ''")


def ranks(value: Any) -> str:
    """`''`, or `q_proj=4,layers.0.mlp.up_proj=2`: numbers by name."""
    if isinstance(value, str):
        pairs = [pair.strip() for pair in text(value).split(',') if pair.strip()]
        if all(re.fullmatch(r'[^=\s]+=[1-9]\d{0,8}', pair) for pair in pairs):
            return ','.join(pairs)
    raise ExpectedError("module names with ranks, such as 'q_proj=4,layers.0.mlp.up_proj=2'")


_axis = integer(-1)


def axis_size(value: Any) -> int:
    """The size of an axis of the mesh, or -1 for all remaining devices."""
    value = _axis(value)
    if value == 0:
        raise ExpectedError('a size >= 1, or -1 for all remaining devices')
    return value


def plain(value: Any) -> Any:
    """A value of an open subtree: texts, numbers, and lists and mappings of them.

    Raises:
      ExpectedError: something else is in it, for example a number that is not finite.
    """
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        raise ExpectedError('integers of at most 64 bits')
    if isinstance(value, float) and not math.isfinite(value):
        raise ExpectedError('finite numbers')
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ExpectedError('names that are texts')
        return {text(name): plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [plain(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if value is not None and not isinstance(value, bool | int | float):
        raise ExpectedError('texts, numbers, True, False, None, and lists and mappings of them')
    return value
