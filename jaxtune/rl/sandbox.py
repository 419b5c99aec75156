"""Runs a program that a model wrote: in a process of its own that can reach, keep and cost next to nothing.

On Linux the program has namespaces of its own (`user_namespaces(7)`): no network, no other process to see or signal, a
file system that is read-only but for one folder, which is memory and ends with it. A filter of system calls
(`seccomp(2)`) keeps it from further processes and any socket. Time, memory, file sizes, open files and output have
limits. Where the system has no namespaces for its user, nothing is run unless that is asked for; then the filter and
the limits are all there is, and the program can read and write what this process can.

It can read files of this machine, but has nowhere to send or keep what it read. Its tests run in the same interpreter:
leaving early, whatever the status, is no way to pass, but a program that changes what an assertion means is not found
out.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from typing import Any

_CHILD = pathlib.Path(__file__).with_name('sandbox_child.py')
_OUTPUT_BYTES = 1 << 20  # that a program may write to stdout and stderr together
_GRACE_SECONDS = 1.0  # to start Python and make the namespaces
_ENV = {'PATH': '/usr/local/bin:/usr/bin:/bin', 'LANG': 'C.UTF-8', 'PYTHONHASHSEED': '0', 'OPENBLAS_NUM_THREADS': '1'}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may cost.

    Attributes:
      seconds: of time, and of the processor.
      memory: MiB of its address space, and of the files in its folder.
      unsafe: it is run without namespaces where the system has none.
    """

    seconds: float = 5.0
    memory: int = 512
    unsafe: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program and its tests ended.

    Attributes:
      passed: every test passed, and the program came to its end.
      reason: else what happened, in a line; '' if it passed.
      printed: the beginning of what it wrote to stdout and stderr, where that was asked for.
    """

    passed: bool
    reason: str = ''
    printed: str = ''


def run(code: str, tests: list[dict[str, Any]], limits: Limits, keep: int = 0) -> Outcome:
    """Runs a Python program and what tests it.

    Args:
      code: the program.
      tests: `{"code": text}`, run after the program with its names, or `{"input": text, "output": text}`: the program
        is run with this on stdin and must print that.
      limits: that hold for all of them together.
      keep: bytes of what is printed to give back at most.

    Returns:
      Whether all passed. It takes at most the limit's seconds and a second more, and leaves nothing behind.
    """
    token = secrets.token_hex(16)
    job = {'code': code, 'tests': tests, 'token': token, 'limits': dataclasses.asdict(limits)}
    with tempfile.TemporaryDirectory(prefix='jaxtune-code-', ignore_cleanup_errors=True) as folder:
        read, write = os.pipe()
        with os.fdopen(read, 'rb') as results:
            try:
                child = subprocess.Popen(
                    [sys.executable, '-I', str(_CHILD), str(write), folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[write],
                    env=_ENV | {'HOME': folder, 'TMPDIR': folder},
                    cwd=folder,
                    start_new_session=True,
                )
            finally:
                os.close(write)
            try:
                printed = bytearray()
                outcome = _outcome(child, results, json.dumps(job).encode(), token, limits, printed)
                if keep:
                    printed += _rest(child.stdout)
                return dataclasses.replace(outcome, printed=printed[:keep].decode(errors='replace'))
            finally:
                _end(child)


def _rest(pipe: Any) -> bytes:
    """What is still in the pipe of a program that has ended, 64 KiB at most."""
    os.set_blocking(pipe.fileno(), False)
    try:
        return os.read(pipe.fileno(), 1 << 16)
    except OSError:  # nothing, though something holds it open
        return b''


def _end(child: subprocess.Popen) -> None:
    """Ends the child, and with it the namespaces and all that is in them; its session, where there are none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, 9)
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _outcome(
    child: subprocess.Popen, results: Any, job: bytes, token: str, limits: Limits, printed: bytearray
) -> Outcome:
    assert child.stdin is not None
    assert child.stdout is not None
    deadline = time.monotonic() + limits.seconds + _GRACE_SECONDS
    answer, sent = b'', 0
    with selectors.DefaultSelector() as selector:
        os.set_blocking(child.stdin.fileno(), False)
        selector.register(child.stdin, selectors.EVENT_WRITE)
        for pipe in (child.stdout, results):
            selector.register(pipe, selectors.EVENT_READ)
        while results in {key.fileobj for key in selector.get_map().values()}:
            left = deadline - time.monotonic()
            if left <= 0:
                return Outcome(False, f'has not ended after {limits.seconds:g} seconds')
            for key, _ in selector.select(left):
                if key.fileobj is child.stdin:
                    try:
                        sent += os.write(key.fd, job[sent : sent + (1 << 16)])
                    except BlockingIOError:
                        continue
                    except OSError:  # it has ended
                        sent = len(job)
                    if sent == len(job):
                        selector.unregister(child.stdin)
                        child.stdin.close()
                    continue
                some = os.read(key.fd, 1 << 16)
                if not some:
                    selector.unregister(key.fileobj)
                elif key.fileobj is results:
                    answer += some[: 4096 - len(answer)]
                else:
                    printed += some
                if len(printed) > _OUTPUT_BYTES:
                    return Outcome(False, f'wrote more than {_OUTPUT_BYTES >> 20} MiB')
    return _read(answer, token)


def _read(answer: bytes, token: str) -> Outcome:
    """What the child said; a program that ended it said nothing, for it does not know the token."""
    for line in answer.decode(errors='replace').splitlines():
        word, _, rest = line.partition(' ')
        if word == token:
            return Outcome(True) if rest == 'passed' else Outcome(False, rest)
        if word == 'unavailable':
            return Outcome(False, f'unavailable: {rest}')
    return Outcome(False, 'ended before its tests did')


def unavailable(limits: Limits) -> str:
    """Why no program can be run here, '' if it can."""
    outcome = run('', [{'code': 'pass'}], dataclasses.replace(limits, seconds=max(limits.seconds, 10.0)))
    return '' if outcome.passed else outcome.reason.removeprefix('unavailable: ')
