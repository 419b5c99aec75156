"""User code in a process of its own, which can be ended where that code never returns.

Imports little: the child starts with it.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from jaxtune.common import preemption
from jaxtune.errors import UserError

_START = (
    'import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[3]).serve()'
)
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_SHOWN = 60  # characters of a sample
_GRACE_SECONDS = 3.0  # that the code has to return after SIGTERM, so that the step can be ended


class UserProcess:
    """A child of this process that answers what it is sent.

    It sees no accelerator, which this process holds. What it prints goes where this process prints.

    Args:
      label: the key and its value, for messages.
      seconds: that its start, or one answer, may take.
      module: whose `serve` the child runs.
      words: that it is given.
      returns: what it is expected to return.

    Raises:
      UserError: its start fails or takes too long.
    """

    def __init__(self, label: str, seconds: float, module: str, words: Sequence[str], returns: str) -> None:
        self.name, self.seconds, self.returns = label, seconds, returns
        self._deadline = time.monotonic() + seconds
        self._sample = ''
        self._connection, theirs = Pipe()
        with theirs:
            given = [json.dumps(sys.path), str(theirs.fileno()), module, *words]
            # In a session of its own: Ctrl-C is for this process to answer.
            self._child = subprocess.Popen(
                [sys.executable, '-P', '-c', _START, *given],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._child)
        self.started = self._answer()

    def _send(self, message: Any, texts: Sequence[str], more_seconds: float = 0.0) -> None:
        """Begins a call about texts; other processes may be sent theirs before this one's answer is received."""
        self._deadline = time.monotonic() + self.seconds + more_seconds
        more = f' and {len(texts) - 1} more' if len(texts) > 1 else ''
        self._sample = f'; it was asked about {shown_text(texts[0])}{more}' if texts else ''
        with contextlib.suppress(OSError):  # it has ended: the answer says how
            self._connection.send(message)

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
                f'{self.name}: its process ended {how}; expected it to return {self.returns}{self._sample}'
            ) from None
        if problem:
            raise UserError(problem)
        return answer


def _end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()


def answer_parent(begin: Callable[..., tuple[Any, Callable[[Any], tuple[str, Any]]]]) -> None:
    """The child: begins with its words, then answers until the parent is gone.

    Args:
      begin: of the words, returns what the parent is told at the start, and what answers a message: a function that
        returns what is wrong, or '', and the answer.
    """
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor, _, *words = sys.argv[2:]
    sys.argv[1:] = []
    connection = Connection(int(descriptor))
    try:
        told, answer = begin(*words)
    except UserError as error:
        connection.send((str(error), None))
        return
    connection.send(('', told))
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(answer(connection.recv()))


def shown_text(text: str) -> str:
    """The beginning of a text, for a message."""
    return repr(text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…')
