"""Huge pages for malloc.

XLA:CPU gives a step's memory back to the system when the step ends, and the next one faults it in again: 240,000
faults for a gigabyte in pages of 4 KiB, a thousand in pages of 2 MiB. glibc asks for those only if it is told so
before the process starts.
"""

import os
import sys
from pathlib import Path

_VARIABLE, _VALUE = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1'
_SETTING = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def begin() -> None:
    """Restarts this process with the same command line, so that it has huge pages.

    Does nothing where the system always or never gives them, and where glibc's tunables are already set.
    Child processes are not told.
    """
    if os.environ.get(_VARIABLE) == _VALUE:
        del os.environ[_VARIABLE]
    elif _VARIABLE not in os.environ and sys.executable and _on_request():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _VARIABLE: _VALUE})


def _on_request() -> bool:
    try:
        return '[madvise]' in _SETTING.read_text()
    except OSError:
        return False
