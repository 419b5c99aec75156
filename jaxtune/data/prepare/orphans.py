"""Imported by the fork server alone: it ends when the driver does, even by SIGKILL, and what it forked ends with it.

Left to themselves its children keep it alive and wait for work for ever.
"""

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def _watch(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(1.0)
    os._exit(1)


if sys.platform == 'linux':
    _libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
