"""Suppresses what native libraries write to stderr beside the exception that they raise."""

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator


class _Held:
    """State of the redirection, shared by all threads."""

    lock = threading.Lock()
    depth = 0
    failed = False
    stderr = -1


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, writes to descriptor 2 are buffered; they are shown at the end unless an exception is raised.

    Rust prints a panic there, with its stack, before the exception reaches Python.
    """
    with _Held.lock:
        _Held.depth += 1
        if _Held.depth == 1:
            _begin()
    try:
        yield
    except BaseException:
        _Held.failed = True
        raise
    finally:
        with _Held.lock:
            _Held.depth -= 1
            if _Held.depth == 0:
                _end()


def _begin() -> None:
    _Held.failed = False
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
        sys.stderr.flush()
    try:
        _Held.stderr = os.dup(2)
    except OSError:
        _Held.stderr = -1
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)


def _end() -> None:
    if _Held.stderr < 0:
        return
    written = os.dup(2)
    os.dup2(_Held.stderr, 2)
    os.close(_Held.stderr)
    with open(written, 'rb') as file:
        file.seek(0)
        if not _Held.failed:
            with contextlib.suppress(OSError), open(2, 'wb', closefd=False) as shown:
                shutil.copyfileobj(file, shown)


def descriptor() -> int:
    """Where standard error goes, also while it is held back: for a last line before the process ends."""
    return _Held.stderr if _Held.depth and _Held.stderr >= 0 else 2
