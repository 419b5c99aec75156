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
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from jaxtune.common import imports, preemption
from jaxtune.errors import UserError, reason

_START = (
    'import json, sys; sys.path[:] = json.loads(sys.argv[1]); '
    'from jaxtune.rl import reward_process; reward_process.serve()'
)
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 3.0  # that a function has to return after SIGTERM, so that the step can be ended


class RewardProcess:
    """The function that `rl.reward` names, in a child of this process.

    It sees no accelerator, which this process holds. What it prints goes where this process prints.

    Args:
      name: `module:function` or `file.py:function`.
      seconds: that importing it, or one call, may take.

    Raises:
      UserError: there is none, or importing it fails or takes too long.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = f'rl.reward={name}', seconds
        self._connection, theirs = Pipe()
        with theirs:
            words = [sys.executable, '-P', '-c', _START, json.dumps(sys.path), str(theirs.fileno()), name]
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

    def __call__(self, given: Mapping[str, Sequence]) -> list[float]:
        """What the function returns for what it has names for, as numbers; at most one more than there are completions.

        Raises:
          UserError: it raises, leaves, or does not return in time.
          preemption.Interrupted: it does not return, and this process is to stop.
        """
        with contextlib.suppress(OSError):  # it has ended: the answer says how
            self._connection.send(dict(given))
        return self._answer()

    def _answer(self) -> Any:
        deadline = time.monotonic() + self.seconds
        while not self._connection.poll(_POLL_SECONDS):
            if preemption.waiting() > _GRACE_SECONDS:
                raise preemption.Interrupted
            if time.monotonic() > deadline:
                _end(self._child)
                raise UserError(
                    f'{self.name}: has not returned after {self.seconds:g} seconds; expected it within '
                    'rl.reward_timeout'
                )
        try:
            problem, answer = self._connection.recv()
        except (EOFError, OSError):
            status = self._child.wait()
            time.sleep(_POLL_SECONDS)  # who ends it may have told this process to stop, too
            if preemption.waiting():
                raise preemption.Interrupted from None
            how = f'by {signal.Signals(-status).name}' if status < 0 else f'with status {status}'
            raise UserError(f'{self.name}: its process ended {how}; expected it to return numbers') from None
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
    descriptor, name = int(sys.argv[2]), sys.argv[3]
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
            connection.send(_ask(function, f'rl.reward={name}', given))


def _ask(function: Callable, name: str, given: Mapping[str, Sequence]) -> tuple[str, list[float]]:
    """What is wrong, or '', and the numbers."""
    try:
        rewards = call(function, given)
        return '', [float(value) for value in itertools.islice(rewards, len(given['completions']) + 1)]
    except BaseException as error:  # the culprit is known, also where it leaves with sys.exit
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f'{frame.filename}:{frame.lineno}'
        return f'{name}: {where}: {reason(error)}', []
    finally:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()


def call(function: Callable, given: Mapping[str, Sequence]) -> Any:
    """Calls it with as much of what is given as it takes: by name where it has one of the names, else in order."""
    parameters = inspect.signature(function).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if 'completions' in parameters:
        rest = inspect.Parameter.VAR_KEYWORD in kinds
        return function(**{name: values for name, values in given.items() if rest or name in parameters})
    ordered = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = 3 if inspect.Parameter.VAR_POSITIONAL in kinds else sum(kind in ordered for kind in kinds)
    return function(*list(given.values())[: max(count, 2)])
