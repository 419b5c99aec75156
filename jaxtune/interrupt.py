"""SIGTERM: a loop that can save notices it between steps; anything else ends at once with status 143."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import jax

STATUS = 143

_received = False
_deferred = False


def _handle(signum, frame):
    global _received
    _received = True
    if not _deferred:
        sys.exit(STATUS)


def install() -> None:
    """Makes SIGTERM end the program with status 143.

    Where several processes run together, JAX's preemption service takes the signal from here on.
    """
    signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, SIGTERM only sets what `received` returns: the loop saves first."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def received(step: int) -> bool:
    """Whether the run must stop after this step.

    All processes of a pod agree on the step, though only one of them may have been told: JAX's preemption service
    settles on one that none has passed yet. Costs no exchange until then.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
    return _received
