"""A user's reward function in a process of its own.

Imports little: the child starts with it.
"""

import contextlib
import functools
import inspect
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.common import imports
from jaxtune.errors import reason, shown
from jaxtune.rl.user_process import UserProcess, answer_parent, shown_text

_SEARCH_SECONDS = 5.0  # for the sample that a function fails on


class RewardProcess(UserProcess):
    """The function that `rl.reward` names, in a child of this process.

    Args:
      name: `module:function` or `file.py:function`.
      seconds: that importing it, or one call, may take.
      called: what `rl.reward` calls it; by default its name.

    Raises:
      UserError: there is none, or importing it fails or takes too long.
    """

    def __init__(self, name: str, seconds: float, called: str = '') -> None:
        words = (name, called or name)
        super().__init__(f'rl.reward={called or name}', seconds, __name__, words, 'numbers')

    def __call__(self, given: Mapping[str, Any]) -> list[float]:
        """What the function returns for what it has names for, as numbers; at most one more than there are completions.

        Raises:
          UserError: it raises, leaves, does not return in time, or returns something else than numbers.
          preemption.Interrupted: it does not return, and this process is to stop.
        """
        self.send(given)
        return self.receive()

    def send(self, given: Mapping[str, Any], more_seconds: float = 0.0) -> None:
        """Begins a call; other processes may be sent theirs before this one's answer is received."""
        self._send(dict(given), given['completions'], more_seconds)

    def receive(self) -> list[float]:
        """The answer to what was sent; errors as for a call."""
        return self._answer()


def serve() -> None:
    """The child."""
    answer_parent(_begin)


def _begin(name: str, called: str) -> tuple[None, Callable[[Mapping[str, Any]], tuple[str, list[float]]]]:
    function = imports.function('rl.reward', name)
    return None, functools.partial(_ask, function, f'rl.reward={called}')


def _ask(function: Callable, name: str, given: Mapping[str, Any]) -> tuple[str, list[float]]:
    """What is wrong, or '', and the numbers."""
    completions = list(given['completions'])
    try:
        own = {key: list(values) if isinstance(values, list) else values for key, values in given.items()}
        rewards = list(itertools.islice(call(function, own), len(completions) + 1))
    except BaseException as error:  # the culprit is known, also where it leaves with sys.exit
        frame = traceback.extract_tb(error.__traceback__)[-1]
        culprit = _culprit(function, given, type(error))
        of = f'; it fails on the answer {shown_text(culprit)}' if culprit is not None else ''
        return f'{name}: {frame.filename}:{frame.lineno}: {reason(error)}{of}', []
    finally:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
    numbers = []
    for place, value in enumerate(rewards):
        try:
            numbers.append(float(value))
        except Exception as error:  # of a foreign __float__
            text = shown_text(completions[min(place, len(completions) - 1)])
            what = 'None' if value is None else f'{shown(value)} ({reason(error)})'
            return f'{name}: returned {what} for {text}; expected a number for each completion', []
    return '', numbers


def _culprit(function: Callable, given: Mapping[str, Any], kind: type[BaseException]) -> str | None:
    """The first completion that alone makes the function raise the same; None if none does, soon enough."""
    until = time.monotonic() + _SEARCH_SECONDS
    for place, text in enumerate(given['completions']):
        own = {key: values[place : place + 1] if isinstance(values, list) else values for key, values in given.items()}
        try:
            for _ in itertools.islice(call(function, own), 2):
                pass
        except kind:
            return text
        except BaseException:
            return None
        if time.monotonic() > until:
            return None
    return None


def call(function: Callable, given: Mapping[str, Any]) -> Any:
    """Calls it with as much of what is given as it takes: by name where it has one of the names, else in order."""
    parameters = inspect.signature(function).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if 'completions' in parameters:
        rest = inspect.Parameter.VAR_KEYWORD in kinds
        return function(**{name: values for name, values in given.items() if rest or name in parameters})
    ordered = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = 3 if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in ordered for kind in kinds)
    return function(*list(given.values())[: max(count, 2)])
