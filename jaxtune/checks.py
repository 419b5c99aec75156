"""What a value of a recipe may be: functions that return the value, mended, or say what was expected."""

import ast
import difflib
import re
from collections.abc import Callable
from typing import Any


class ExpectedError(ValueError):
    """A value is impossible; the text says what was expected."""


Check = Callable[[Any], Any]


def one_of(*names: str) -> Check:
    def check(value):
        if value not in names:
            near = difflib.get_close_matches(str(value), names, 1)
            raise ExpectedError(f'one of {", ".join(names)}' + (f' (nearest: {near[0]})' if near else ''))
        return value

    return check


def integer(low: int | None = None, *words: str, high: int | None = None) -> Check:
    expected = 'an integer' + ('' if low is None else f' >= {low}') + ('' if high is None else f' and <= {high}')
    expected += ''.join(f" or '{word}'" for word in words)

    def check(value):
        if value in words:
            return value
        if isinstance(value, str) and re.fullmatch(r'[+-]?\d+', value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ExpectedError(expected)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ExpectedError(expected)
        return value

    return check


def number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Check:
    expected = 'a number' + ''.join(
        f' {sign} {bound:g}' for sign, bound in (('>=', low), ('>', above), ('<=', high)) if bound is not None
    )

    def check(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpectedError(expected)
        value = float(value)
        outside = (low is not None and value < low) or (high is not None and value > high)
        if value != value or outside or (above is not None and value <= above):
            raise ExpectedError(expected)
        return value

    return check


def boolean(value):
    if not isinstance(value, bool):
        raise ExpectedError('True or False')
    return value


def text(value):
    if not isinstance(value, str):
        raise ExpectedError('a text')
    return value


def names(value):
    """A text, or several of them."""
    if isinstance(value, str) and value[:1] in '([':
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ExpectedError("a name or a tuple of names such as ('q_proj','v_proj')") from None
    if isinstance(value, str):
        return value
    if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
        raise ExpectedError("a name or a tuple of names such as ('q_proj','v_proj')")
    return tuple(value)


def layers(value):
    """`all`, `4:8`, or the numbers of the layers."""
    if value == 'all' or (isinstance(value, str) and re.fullmatch(r'\d*:\d*', value)):
        return value
    if isinstance(value, tuple | list) and value and all(isinstance(i, int) and i >= 0 for i in value):
        return tuple(value)
    raise ExpectedError("'all', a range such as '4:8', or a tuple of layer numbers")


def ranks(value):
    """`''`, or `q_proj=4,layers.0.mlp.up_proj=2`: numbers by name."""
    if isinstance(value, str):
        pairs = [pair.strip() for pair in value.split(',') if pair.strip()]
        if all(re.fullmatch(r'[^=\s]+=[1-9]\d*', pair) for pair in pairs):
            return ','.join(pairs)
    raise ExpectedError("module names with ranks, such as 'q_proj=4,layers.0.mlp.up_proj=2'")


_axis = integer(-1)


def axis_size(value):
    value = _axis(value)
    if value == 0:
        raise ExpectedError('a size >= 1, or -1 for all remaining devices')
    return value
