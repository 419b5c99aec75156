"""A person's reward function in a process of its own, which can be ended where the function never returns.

Imports little: the child starts with it.
"""

import contextlib
import ctypes
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Any

from jaxtune.common import imports, preemption
from jaxtune.errors import UserError, reason, shown

_START = (
    'import json, sys; sys.path[:] = json.loads(sys.argv[1]); '
    'from jaxtune.rl import reward_process; reward_process.serve()'
)
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_SEARCH_SECONDS = 5.0  # for the sample that a function fails on
_SHOWN = 60  # characters of it
_GRACE_SECONDS = 3.0  # that a function has to return after SIGTERM, so that the step can be ended


class RewardProcess:
    """The function that `rl.reward` names, in a child of this process.

    It sees no accelerator, which this process holds. What it prints goes where this process prints.

    Args:
      name: `module:function` or `file.py:function`.
      seconds: that importing it, or one call, may take.
      called: what `rl.reward` calls it; by default its name.

    Raises:
      UserError: there is none, or importing it fails or takes too long.
    """

    def __init__(self, name: str, seconds: float, called: str = '') -> None:
        self.name, self.seconds = f'rl.reward={called or name}', seconds
        self._deadline = time.monotonic() + seconds
        self._sample = ''
        self._connection, theirs = Pipe()
        with theirs:
            words = [sys.executable, '-P', '-c', _START, json.dumps(sys.path), str(theirs.fileno()), name]
            words.append(called or name)
            # In a session of its own: Ctrl-C is for this process to answer.
            self._child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._child)
        self._answer()

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
        self._deadline = time.monotonic() + self.seconds + more_seconds
        texts = given['completions']
        more = f' and {len(texts) - 1} more' if len(texts) > 1 else ''
        self._sample = f'; it was asked about {shown_text(texts[0])}{more}' if texts else ''
        with contextlib.suppress(OSError):  # it has ended: the answer says how
            self._connection.send(dict(given))

    def receive(self) -> list[float]:
        """The answer to what was sent; errors as for a call."""
        return self._answer()

    def _answer(self) -> Any:
        deadline = self._deadline
        while not self._connection.poll(_POLL_SECONDS):
            if preemption.waiting() > _GRACE_SECONDS:
                raise preemption.Interrupted
            if time.monotonic() > deadline:
                _end(self._child)
                raise UserError(
                    f'{self.name}: has not returned after {self.seconds:g} seconds; expected it within '
                    f'rl.reward_timeout{self._sample}'
                )
        try:
            problem, answer = self._connection.recv()
        except (EOFError, OSError):
            status = self._child.wait()
            time.sleep(_POLL_SECONDS)  # who ends it may have told this process to stop, too
            if preemption.waiting():
                raise preemption.Interrupted from None
            how = f'by {signal.Signals(-status).name}' if status < 0 else f'with status {status}'
            raise UserError(
                f'{self.name}: its process ended {how}; expected it to return numbers{self._sample}'
            ) from None
        if problem:
            raise UserError(problem)
        return answer


def _end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()


def serve() -> None:
    """The child: imports the function, then answers until the parent is gone."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor, name, called = int(sys.argv[2]), *sys.argv[3:5]
    sys.argv[1:] = []
    connection = Connection(descriptor)
    try:
        function = imports.function('rl.reward', name)
    except UserError as error:
        connection.send((str(error), None))
        return
    connection.send(('', None))
    with contextlib.suppress(EOFError, OSError):
        while True:
            given = connection.recv()
            connection.send(_ask(function, f'rl.reward={called}', given))


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


def shown_text(text: str) -> str:
    """The beginning of a completion, for a message."""
    return repr(text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…')


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
