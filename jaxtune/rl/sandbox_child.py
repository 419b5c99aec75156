"""The inner end of `sandbox`: makes the namespaces, sets the limits, runs the program and its tests. A script.

It imports nothing but the standard library. Three processes: the outer one waits, the first of the new process
namespace waits too (when it ends, the kernel ends all others there), and the last one runs the program.
"""

import contextlib
import ctypes
import io
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from typing import Any, NoReturn

_NEW_NAMESPACES = 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x08000000  # user, pid, net, mount, ipc
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_RDONLY, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 1, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD, _ATTR_RDONLY, _ATTR_NOSUID = 442, 0x8000, -100, 1, 2
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _FILTER = 1, 38, 22, 24, 2
_DEVICES = ('null', 'zero', 'random', 'urandom')
_FILES = 64  # open at once
_EPERM, _ENOSYS, _EAGAIN = 1, 38, 11

# Per machine: the filter's name of it, and the numbers of `clone`, `clone3`, `capset` and what is refused: other
# processes, sockets, namespaces, mounts, memory that no limit counts, and what looks into processes or the kernel.
_SYSTEM = {
    'x86_64': (
        0xC000003E, 56, 435, 126,
        (57, 58, 41, 272, 308, 165, 166, 155, 161, 442, 429, 428, 430, 319, 29, 240, 101, 311, 321, 250, 248, 249, 425,
         298, 323, 304, 447),
    ),
    'aarch64': (
        0xC00000B7, 220, 435, 91,
        (198, 97, 268, 40, 39, 41, 51, 442, 429, 428, 430, 279, 194, 180, 117, 271, 280, 219, 217, 218, 425, 241, 282,
         265, 447),
    ),
}  # fmt: skip


def main() -> None:
    """Reads the job from stdin and writes its outcome to the pipe whose number is the first argument."""
    results, folder = int(sys.argv[1]), sys.argv[2]
    job = json.load(sys.stdin.buffer)
    die_with_parent()
    unsafe = job['limits']['unsafe']
    try:
        isolate(folder, job['limits']['memory'], results)
    except OSError as error:
        if not unsafe:
            say(results, 'unavailable', f'no namespaces for programs ({error})')
            return
        os.chdir(folder)
    child = os.fork()
    if child:
        os.close(results)
        os.waitpid(child, 0)
        return
    die_with_parent()
    try:
        restrict(job['limits'])
    except OSError as error:
        if not unsafe:
            say(results, 'unavailable', f'no filter of system calls ({error})')
            os._exit(0)
    run(job['code'], job['tests'], job['token'], results)


def say(results: int, word: str, rest: str) -> None:
    """Writes a line to the pipe."""
    os.write(results, f'{word} {" ".join(rest.split())[:300]}\n'.encode(errors='replace'))


def call(name: str, *arguments: Any) -> int:
    """Calls the C library.

    Raises:
      OSError: it returned -1.
    """
    number = getattr(LIBC, name)(*arguments)
    if number == -1:
        code = ctypes.get_errno()
        raise OSError(code, f'{name}: {os.strerror(code)}')
    return number


LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """The kernel ends this process when its parent ends."""
    if sys.platform == 'linux':
        LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def isolate(folder: str, memory: int, results: int) -> None:
    """Goes on as the first process of new namespaces, in `folder`, which is memory now; the rest is read-only.

    Args:
      folder: an empty one.
      memory: MiB that its files may have.
      results: the pipe, which the outer process closes.

    Raises:
      OSError: the system has none for this user.
    """
    if sys.platform != 'linux' or platform.machine() not in _SYSTEM:
        raise OSError(_ENOSYS, f'not on {sys.platform} {platform.machine()}')
    user, group = os.getuid(), os.getgid()
    call('unshare', _NEW_NAMESPACES)
    die_with_parent()  # again, for rights have changed
    for name, text in (('setgroups', 'deny'), ('uid_map', f'{user} {user} 1'), ('gid_map', f'{group} {group} 1')):
        with open(f'/proc/self/{name}', 'w') as file:
            file.write(text)
    child = os.fork()
    if child:
        os.close(results)  # it ends with the program, not with this process
        os.waitpid(child, 0)
        os._exit(0)
    die_with_parent()
    mount(None, '/', None, _MS_REC | _MS_PRIVATE)
    attributes = struct.pack('QQQQ', _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    call('syscall', _MOUNT_SETATTR, _AT_FDCWD, b'/', _AT_RECURSIVE, attributes, len(attributes))
    devices = {name: os.open(f'/dev/{name}', os.O_PATH) for name in _DEVICES}
    mount('tmpfs', '/dev', 'tmpfs', _MS_NOSUID | _MS_NOEXEC, 'size=64k,mode=755')
    for name, number in devices.items():
        os.close(os.open(f'/dev/{name}', os.O_CREAT | os.O_WRONLY))
        mount(f'/proc/self/fd/{number}', f'/dev/{name}', None, _MS_BIND)
        os.close(number)
    options = f'size={memory}m,nr_inodes=4096,mode=700'
    mount('tmpfs', folder, 'tmpfs', _MS_NOSUID | _MS_NODEV, options)
    try:
        mount('proc', '/proc', 'proc', _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY)
    except OSError:  # a container hides parts of its own; then all of it is hidden
        mount('tmpfs', '/proc', 'tmpfs', _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY, 'size=4k')
    os.chdir(folder)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = '') -> None:
    """`mount(2)`.

    Raises:
      OSError: it failed.
    """
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    call('mount', *words, ctypes.c_ulong(flags), options.encode() or None)


def restrict(limits: dict[str, Any]) -> None:
    """Takes rights, system calls, memory, time and files from this process, for good.

    Raises:
      OSError: the system has no filter of system calls.
    """
    seconds, memory = int(limits['seconds']) + 1, limits['memory'] << 20
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_AS, memory),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if sys.platform != 'linux' or platform.machine() not in _SYSTEM:
        raise OSError(_ENOSYS, f'not on {sys.platform} {platform.machine()}')
    architecture, clone, clone3, capset, refused = _SYSTEM[platform.machine()]
    for capability in range(64):
        if LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    header, none = struct.pack('Ii', 0x20080522, 0), bytes(24)
    call('syscall', capset, header, none)
    call('prctl', _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = seccomp(architecture, clone, clone3, refused)
    instructions = ctypes.create_string_buffer(program)
    filters = struct.pack('HxxxxxxQ', len(program) // 8, ctypes.addressof(instructions))
    call('prctl', _PR_SET_SECCOMP, _FILTER, filters, 0, 0)


def seccomp(architecture: int, clone: int, clone3: int, refused: tuple[int, ...]) -> bytes:
    """The filter: `refused` fail with EPERM, and of `clone` what would make another process than a thread does."""
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (leave, 0, 0, fail | _EPERM)]  # numbers of another mode of the machine
    for number in refused:
        lines += [(equal, 0, 1, number), (leave, 0, 0, fail | _EPERM)]
    lines += [(equal, 0, 1, clone3), (leave, 0, 0, fail | _ENOSYS)]  # the library takes `clone` then
    lines += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, 0x00010000), (leave, 0, 0, fail | _EAGAIN)]
    lines += [(leave, 0, 0, allow)]
    return b''.join(struct.pack('HBBI', *line) for line in lines)


def run(code: str, tests: list[dict[str, Any]], token: str, results: int) -> NoReturn:
    """Runs the program and its tests, says how that went, and ends."""
    sys.argv[:] = ['program.py']
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        attempt(code, tests)
        outcome = 'passed'
    except BaseException as error:  # whatever the program raises, sys.exit too
        last = traceback.format_exception_only(error)[-1] if not isinstance(error, MemoryError) else 'MemoryError'
        outcome = f'failed: {last}'
    if not tests:  # what it printed is looked at
        with contextlib.suppress(Exception):  # it may have closed or replaced them
            sys.stdout.flush()
            sys.stderr.flush()
    # A program's thread, or what it registered to run at the end, has no say.
    say(results, token, outcome)
    os._exit(0)


def attempt(code: str, tests: list[dict[str, Any]]) -> None:
    """Runs the program, and each test after it or on it; raises where one fails."""
    program = compile(code, 'program.py', 'exec', dont_inherit=True)
    asserted = [test['code'] for test in tests if 'code' in test]
    if asserted or not tests:
        names: dict[str, Any] = {'__name__': '__main__', '__builtins__': __builtins__}
        exec(program, names)
        for test in asserted:
            exec(compile(test, 'tests.py', 'exec', dont_inherit=True), names)
    for test in tests:
        if 'code' not in test:
            printed = run_with(program, test['input'])
            if lines_of(printed) != lines_of(test['output']):
                raise AssertionError(f'printed {printed[:80]!r}, expected {test["output"][:80]!r}')


def run_with(program: Any, given: str) -> str:
    """What the program prints with a text on stdin, which is a file in its folder."""
    with open('.stdin', 'wb') as file:
        file.write(given.encode(errors='surrogateescape'))
    number = os.open('.stdin', os.O_RDONLY)
    os.unlink('.stdin')
    if number:  # 0 where the program before closed it
        os.dup2(number, 0)
        os.close(number)
    printed, before = Printed(), (sys.stdin, sys.stdout)
    try:
        with open(0, encoding='utf-8', closefd=False) as sys.stdin:
            sys.stdout = printed
            exec(program, {'__name__': '__main__', '__builtins__': __builtins__})
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    finally:
        sys.stdin, sys.stdout = before
    printed.flush()
    return printed.buffer.getvalue().decode(errors='replace')  # pyright: ignore[reportAttributeAccessIssue]


class Printed(io.TextIOWrapper):
    """A stdout in memory."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding='utf-8', write_through=True)


def lines_of(text: str) -> list[str]:
    """Lines without space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


if __name__ == '__main__':
    main()
