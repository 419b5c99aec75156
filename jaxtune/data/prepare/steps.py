"""The steps of preparation in their order, and those that a recipe adds as `data.custom_steps`."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

from jaxtune.common.registry import Registry
from jaxtune.data.prepare import Step
from jaxtune.data.prepare.plan import Plan
from jaxtune.errors import UserError, blamed_on, shown

STEPS = Registry(
    'data.custom_steps',
    Step,
    {
        'extract': 'jaxtune.data.prepare.web:STEP',
        'clean': 'jaxtune.data.prepare.clean:STEP',
        'length': 'jaxtune.data.prepare.length:STEP',
        'language': 'jaxtune.data.prepare.language:STEP',
        'gopher repetition': 'jaxtune.data.prepare.gopher_repetition:STEP',
        'gopher quality': 'jaxtune.data.prepare.gopher_quality:STEP',
        'c4': 'jaxtune.data.prepare.c4:STEP',
        'fineweb': 'jaxtune.data.prepare.fineweb:STEP',
        'code': 'jaxtune.data.prepare.code_quality:STEP',
        'zh': 'jaxtune.data.prepare.chinese:STEP',
        'blocklist': 'jaxtune.data.prepare.blocklist:STEP',
        'custom': 'jaxtune.data.prepare.custom:STEP',
        # Steps of a recipe's data.custom_steps stand here.
        'decontaminate': 'jaxtune.data.prepare.decontaminate:STEP',
        'exact duplicates': 'jaxtune.data.prepare.exact_duplicates:STEP',
        'near-duplicates': 'jaxtune.data.prepare.near_duplicates:STEP',
        'paragraphs': 'jaxtune.data.prepare.paragraphs:STEP',
        'substrings': 'jaxtune.data.prepare.substring_dedup:STEP',
        'mixture': 'jaxtune.data.prepare.mixture:STEP',
    },
)
_LAST_FILTER = 'custom'


def every(custom: tuple[str, ...] = ()) -> tuple[Step, ...]:
    """All steps in their order, whether a recipe asks for them or not.

    Args:
      custom: the value of `data.custom_steps`.

    Raises:
      UserError: one of those is no per-document step, or its name is taken.
    """
    return _every(custom, os.getcwd())  # from which a custom step's file or module is looked for


@functools.cache
def _every(custom: tuple[str, ...], folder: str) -> tuple[Step, ...]:
    steps = []
    for name in STEPS.names:
        steps.append(STEPS.get(name))
        if name == _LAST_FILTER:
            steps += map(_custom, custom)
    names = [step.name for step in steps]
    for reference, step in zip(custom, steps[names.index(_LAST_FILTER) + 1 :], strict=False):
        if names.count(step.name) > 1:
            raise UserError(
                f'data.custom_steps={reference}: a step named {step.name!r} is there already; expected another name'
            )
    return tuple(steps)


def asked_for(plan: Plan) -> list[Step]:
    """The steps that a plan asks for, in their order."""
    return [step for step in every(plan.custom_steps) if step.on(plan.settings)]


def _custom(reference: str) -> Step:
    if ':' not in reference:
        raise UserError(f'data.custom_steps={shown(reference)}: expected module:NAME or file.py:NAME of a Step')
    step = STEPS.get(reference)
    if step.process is None or step.corpus is not None:
        raise UserError(f'data.custom_steps={reference}: expected a step with process, and without corpus')
    if not isinstance(step.name, str) or not step.name.strip():
        raise UserError(f'data.custom_steps={reference}: name={shown(step.name)}: expected a text')
    guard = functools.partial(_guarded, reference)
    return dataclasses.replace(
        step,
        process=_returns_text(reference, guard(step.process)),
        **{name: guard(getattr(step, name)) for name in ('applies', 'on', 'load')},
    )


def _guarded(reference: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; whatever it raises names the key and the line."""
    file = getattr(getattr(function, '__code__', None), 'co_filename', '')

    def call(*arguments: Any) -> Any:
        with blamed_on(f'data.custom_steps={reference}', file):
            return function(*arguments)

    return call


def _returns_text(reference: str, function: Callable[..., Any]) -> Callable[..., str]:
    def call(*arguments: Any) -> str:
        after = function(*arguments)
        if not isinstance(after, str):
            raise UserError(
                f'data.custom_steps={reference}: process returned {shown(after)}; expected the text, or Dropped(reason)'
            )
        return after

    return call
