"""Programs that a model might write, run for real: none costs more than its limit, reaches out, or leaves anything."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxtune.rl import sandbox
from jaxtune.rl.sandbox import Limits, run

LIMITS = Limits(seconds=1.0, memory=256)
PASSES = [{'code': 'pass'}]

pytestmark = pytest.mark.skipif(bool(sandbox.unavailable(LIMITS)), reason='the system has no namespaces for its user')


@pytest.mark.parametrize(
    ('code', 'tests', 'passed'),
    [
        ('def f(x):\n    return x + 1', [{'code': 'assert f(1) == 2'}, {'code': 'assert f(2) == 3'}], True),
        ('def f(x):\n    return x', [{'code': 'assert f(1) == 2'}], False),
        ('print(2 * int(input()))', [{'input': '4\n', 'output': '8\n'}, {'input': '5', 'output': '10'}], True),
        ('print(2 * int(input()))', [{'input': '4', 'output': '9'}], False),
        (
            'import sys\nfor line in sys.stdin: print(line.strip())\nsys.exit()',
            [{'input': 'a\nb', 'output': 'a\nb'}],
            True,
        ),
        ('print(open(0).read()[::-1])', [{'input': 'ab', 'output': 'ba'}, {'input': 'ä', 'output': 'ä'}], True),
        ('def f(:', PASSES, False),
        ("open('mine', 'w').write('x')", [{'code': "assert open('mine').read() == 'x'"}], True),
        ('import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()', PASSES, True),
    ],
)
def test_a_program_passes_its_tests_or_does_not(code, tests, passed):
    outcome = run(code, tests, LIMITS)
    assert outcome.passed == passed, outcome
    assert bool(outcome.reason) != passed


HOSTILE = {
    'fork bomb': ('import os\nwhile True:\n    os.fork()', 'Resource temporarily unavailable'),
    'caught fork bomb': ('import os\nwhile True:\n    try: os.fork()\n    except OSError: pass', 'has not ended'),
    'thread bomb': ('from threading import *\nwhile True: Thread(target=Event().wait).start()', 'new thread'),
    'allocation': ('x = bytearray(10 << 30)', 'MemoryError'),
    'loop': ('while True: pass', 'has not ended after 1 seconds'),
    'sleep': ('import time\ntime.sleep(99)', 'has not ended after 1 seconds'),
    'write outside': ("open('{outside}/evil', 'w').write('x')", 'Read-only file system'),
    'remove outside': ("import shutil\nshutil.rmtree('{outside}')", 'Read-only file system'),
    'large files': ('with open("f", "wb") as f:\n    while True: f.write(bytes(1 << 20))', 'File too large'),
    'many files': ('f = [open(str(i), "w") for i in range(999)]', 'Too many open files'),
    'socket': ('import socket\nsocket.socket()', 'not permitted'),
    'connect': ("import socket\nsocket.create_connection(('127.0.0.1', {port}))", 'not permitted'),
    'kill its parent': ('import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(99)', 'has not ended'),
    'kill the tests': ('import os\nos.kill({pid}, 9)', 'No such process'),
    'kill everything': ('import os\nos.kill(-1, 9)', 'No such process'),
    'output': ('import sys\nfor _ in range(100): sys.stdout.write("x" * (1 << 20))', 'wrote more than'),
    'mount': (
        'import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.mount(None, b"/", None, ctypes.c_ulong(32), None) == 0',
        'AssertionError',
    ),
    'leave before the tests': ('import os\nos._exit(0)', 'ended before its tests did'),
    'exit before the tests': ('import sys\nsys.exit(0)', 'SystemExit'),
    'claim to have passed': (
        'import os\nfor n in range(3, 9):\n    try: os.write(n, b"passed\\n")\n    except OSError: pass\nos._exit(0)',
        'ended before its tests did',
    ),
    'crash': ('import ctypes\nctypes.string_at(0)', 'ended before its tests did'),
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_what_is_hostile_fails_within_its_limit_and_leaves_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'temp'))
    (tmp_path / 'temp').mkdir()
    (tmp_path / 'kept').mkdir()
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.settimeout(0)
        places = {'outside': str(tmp_path / 'kept'), 'port': str(server.getsockname()[1]), 'pid': str(os.getpid())}
        code, said = HOSTILE[name]
        for key, value in places.items():
            code = code.replace(f'{{{key}}}', value)
        before, began = children(), time.monotonic()
        outcome = run(code, [{'code': 'assert True'}], LIMITS)
        seconds = time.monotonic() - began
        with pytest.raises(BlockingIOError):  # nobody came
            server.accept()
    assert not outcome.passed
    assert said in outcome.reason
    assert seconds < LIMITS.seconds + 30  # far beyond any limit of its own, for a machine that is busy
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['kept', 'temp']
    deadline = time.monotonic() + 30
    while children() != before and time.monotonic() < deadline:  # the kernel ends those of a namespace by and by
        time.sleep(0.05)
    assert children() == before


def children() -> set[int]:
    """Processes anywhere that run the inner end of the sandbox."""
    found = set()
    for place in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if b'sandbox_child' in place.read_bytes() and b'Z' not in (place.parent / 'stat').read_bytes().split()[2:3]:
                found.add(int(place.parent.name))
        except OSError:
            continue
    return found


def test_it_sees_no_environment_and_no_other_process(monkeypatch):
    monkeypatch.setenv('SECRET_KEY', 'xyzzy')
    code = 'import os\nfound = [os.environ.copy(), [name for name in os.listdir("/proc") if name.isdigit()]]'
    tests = [
        {'code': 'assert "SECRET_KEY" not in found[0]'},
        {'code': 'assert len(found[1]) <= 2, found'},
        {'code': 'assert sorted(os.listdir("/dev")) == ["null", "random", "urandom", "zero"]'},
    ]
    assert run(code, tests, LIMITS).passed


def test_a_large_job_and_several_at_once():
    outcomes = []
    code = f'x = {"y" * 300_000!r}'

    def one():
        outcomes.append(run(code, [{'code': 'assert len(x) == 300_000'}], Limits(seconds=20, memory=256)))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.passed for outcome in outcomes] == [True] * 4


def test_it_ends_with_the_process_that_runs_it():
    before = children()
    code = (
        'from jaxtune.rl.sandbox import *\nprint("ready", flush=True)\n'
        'run("while True: pass", [], Limits(seconds=100, memory=256))'
    )
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        deadline = time.monotonic() + 60
        while len(children() - before) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(children() - before) == 3
        owner.kill()
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() <= before


def test_without_namespaces_nothing_is_run_unless_it_is_asked_for(monkeypatch, tmp_path):
    """Where the child cannot make them: here it is told of a machine that it does not know."""
    text = pathlib.Path(sandbox._CHILD).read_text()
    child = tmp_path / 'child.py'
    child.write_text(text.replace("call('unshare', _NEW_NAMESPACES)", "raise OSError(1, 'not permitted')"))
    monkeypatch.setattr(sandbox, '_CHILD', child)
    assert 'no namespaces for programs' in sandbox.unavailable(LIMITS)
    outcome = run('x = 1', [{'code': 'assert x'}], LIMITS)
    assert (outcome.passed, outcome.reason[:11]) == (False, 'unavailable')
    unsafe = Limits(1.0, 256, unsafe=True)
    assert not sandbox.unavailable(unsafe)
    for code in (
        'import os\nos.fork()',
        'import socket\nsocket.socket()',
        'x = bytearray(1 << 30)',
        'while True: pass',
    ):
        assert not run(code, PASSES, unsafe).passed
