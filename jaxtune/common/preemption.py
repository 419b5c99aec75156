"""SIGTERM and Ctrl-C: a loop that can save notices them between steps; anything else ends at once.

A signal only ever sets a flag, for an exception raised wherever the program happens to be may land in a library's
callback, which swallows it. A thread of its own sees the flag, also while the main thread is inside a compiler or a
tokenizer: files are written whole or not at all, so that the process may simply end.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from jaxtune.common import stderr

_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
_NAMES = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}
_LEAVE_SECONDS = 10.0  # for the work after the checkpoint is saved

_received: signal.Signals | None = None
_since = 0.0
_deferred = False
_pod = False
_doing = ''
_pipe: tuple[int, int] | None = None


class Interrupted(Exception):  # noqa: N818
    """Raised by code that waits when the flag is set; the current step has changed nothing yet."""


def _ignore(signum: int, frame: FrameType | None) -> None:
    """The signal's number goes to the pipe, whose thread does the rest."""


def install() -> None:
    """Makes SIGTERM and Ctrl-C end the program with status 143 and 130, or set the flag inside `deferred`.

    Where several processes run together, JAX's preemption service takes SIGTERM from here on.
    """
    global _pipe
    if _pipe is None:
        _pipe = os.pipe()
        os.set_blocking(_pipe[1], False)
        threading.Thread(target=_watch, args=(_pipe[0],), name='interrupt', daemon=True).start()
        os.register_at_fork(after_in_child=_forget)
    for number in _STATUS:
        signal.signal(number, _ignore)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STATUS)


def hold() -> None:
    """Lets signals wait for `install`, also across the start of another program in this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STATUS)


def finish() -> None:
    """Lets SIGTERM change nothing any more: what was asked for is done, or refused, and the process is leaving.

    Python gives signals back to the system while it leaves, which would then kill the process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """`install` while a command runs; afterwards signals do what they did before."""
    global _received
    before = {number: signal.getsignal(number) for number in _STATUS}
    if _ignore in before.values():
        yield
        return
    _received = None
    install()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _forget() -> None:
    """In a forked child, signals are not the parent's."""
    global _pipe
    if _pipe is not None and _ignore in map(signal.getsignal, _STATUS):
        signal.set_wakeup_fd(-1)
        for number in _STATUS:
            signal.signal(number, signal.SIG_DFL)
    _pipe = None


def _watch(pipe: int) -> None:
    while True:
        for number in os.read(pipe, 64):
            if number in _STATUS:
                _receive(signal.Signals(number))


def _receive(number: signal.Signals) -> None:
    global _received, _since
    again = number is signal.SIGINT and _received is signal.SIGINT
    if _received is None:
        _received, _since = number, time.monotonic()
    if again:
        _say('jaxtune: interrupted a second time; the same command continues from the last checkpoint')
        os._exit(_STATUS[number])
    if not _deferred:
        _say(f'jaxtune: stopped by {_NAMES[number]}; the same command continues')
        os._exit(_STATUS[number])
    if number is signal.SIGINT:
        _say(f'jaxtune: Ctrl-C: {_doing}; once more leaves at once')
        if _pod:  # which agrees on a step by JAX's preemption service
            os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    """Writes a line past whatever holds the streams' locks, below a bar that may be drawn there."""
    descriptor = stderr.descriptor()
    terminal = os.isatty(descriptor)
    with contextlib.suppress(OSError):
        os.write(descriptor, (f'\r\x1b[2K\x1b[?25h{text}\n' if terminal else f'{text}\n').encode())


@contextlib.contextmanager
def deferred(doing: str = 'saving after this update') -> Iterator[None]:
    """Inside, signals only set what `received` returns: the loop saves first.

    Args:
      doing: said at Ctrl-C: what happens now.
    """
    global _deferred, _pod, _doing
    import jax  # slow to import; loaded by then

    _pod = jax.process_count() > 1
    _deferred, _doing = True, doing
    try:
        yield
    finally:
        _deferred = False
    if _received is not None and not _pod:
        sys.exit(status())


def received(step: int) -> bool:
    """Whether the run must stop after this step.

    All processes of a pod agree on the step, though only one of them may have been told: JAX's preemption service
    settles on one that none has passed yet. Costs no exchange until then.
    """
    if _pod:
        from jax.experimental import multihost_utils  # slow to import; loaded by then

        return multihost_utils.reached_preemption_sync_point(step)
    return _received is not None


def waiting() -> float:
    """Seconds since a signal that this process may answer on its own, 0 without one; for code that waits long."""
    return time.monotonic() - _since if _received is not None and not _pod else 0.0


def status() -> int:
    """The exit status of a run that was stopped."""
    return _STATUS[_received or signal.SIGTERM]


def name() -> str:
    """What stopped the run."""
    return _NAMES[_received or signal.SIGTERM]


def by_person() -> bool:
    """Whether it was Ctrl-C that stopped the run."""
    return _received is signal.SIGINT


def leave() -> NoReturn:
    """Ends the program with its status: by the usual way, or if that hangs, without.

    Raises:
      SystemExit: always.
    """
    end = threading.Timer(_LEAVE_SECONDS, os._exit, [status()])
    end.daemon = True
    end.start()
    sys.exit(status())
