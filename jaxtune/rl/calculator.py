"""The environment `calculator`: the model writes `<calc>12 + 34</calc>`, and ` = 46` is added.

In a conversation a call of the tool `calculator` is answered by a turn with the number alone.
"""

import ast
import fractions
import operator
from typing import Any

from jaxtune.rl import Environment, Problem
from jaxtune.rl.tool_calls import asked, tool

_LONGEST = 200  # characters of an expression
_DIGITS = 60  # of a numerator or denominator
_LARGEST = 10**_DIGITS
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> fractions.Fraction:
    """The exact value of `+ - * / // % **` and brackets over decimal numbers; `x`, `×`, `÷` and `^` are read too.

    Raises:
      ValueError: it is none, too long, or a number in it has more than 60 digits.
      ZeroDivisionError: it divides by 0.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f'longer than {_LONGEST} characters')
    for shown, meant in (('×', '*'), ('÷', '/'), ('−', '-'), ('^', '**'), (',', '')):
        expression = expression.replace(shown, meant)
    try:
        tree = ast.parse(expression.strip().removesuffix('=').strip(), mode='eval')
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError('no expression') from None
    return _value(tree.body)


def _value(node: ast.expr) -> fractions.Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(fractions.Fraction(str(number)))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            return -_value(inner) if isinstance(sign, ast.USub) else _value(inner)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=symbol, right=right) if type(symbol) in _OPERATORS:
            return _bounded(fractions.Fraction(_OPERATORS[type(symbol)](_value(left), _value(right))))
    raise ValueError('expected numbers and + - * / // % ** ( )')


def _power(base: fractions.Fraction, exponent: fractions.Fraction) -> fractions.Fraction:
    if exponent.denominator != 1 or abs(exponent) > 4 * _DIGITS:
        raise ValueError('expected a small whole exponent')
    return _bounded(base**exponent.numerator)


def _bounded(number: fractions.Fraction) -> fractions.Fraction:
    if max(abs(number.numerator), number.denominator) >= _LARGEST:
        raise ValueError(f'more than {_DIGITS} digits')
    return number


def shown(number: fractions.Fraction) -> str:
    """A whole number as it is; another rounded to 12 significant digits."""
    return str(number.numerator) if number.denominator == 1 else f'{float(number):.12g}'


def reset(problem: Problem) -> None:
    """There is nothing to remember."""


def step(state: Any, text: str) -> tuple[Any, str | None, float, bool]:
    """The value of what a turn asks for; a turn that asks for none is the last."""
    question = asked(text, 'calc', 'calculator', 'expression')
    if question is None:
        return state, None, 0.0, True
    expression, tagged = question
    try:
        value = shown(calculate(expression))
    except ZeroDivisionError:
        value = 'error: division by 0'
    except (ValueError, ArithmeticError) as error:
        value = f'error: {error}'
    return state, f' = {value}' if tagged else value, 0.0, False


ENVIRONMENT = Environment(
    'calculator',
    reset,
    step,
    stops=('</calc>',),
    tools=(tool('calculator', 'Evaluates an arithmetic expression.', 'expression', 'such as (12 + 34) * 5'),),
)
