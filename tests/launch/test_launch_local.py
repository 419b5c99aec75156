"""Several processes of one run on this machine: their output, their signals, their end."""

import json
import pathlib
import runpy
import signal
import subprocess
import sys

import pytest

LOCAL = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'local.py'
local = runpy.run_path(str(LOCAL))

# A process that says so and waits for a signal.
WAITS = 'import signal; print("ready", flush=True); signal.pause()'
# One that ends in order when it is told to.
OBEYS = f'import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); {WAITS.partition("; ")[2]}'
# The launcher in a process of its own, without threads, over the programs that it is given.
DRIVER = """
import json, runpy, sys
local, programs, grace = runpy.run_path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
sys.exit(local['run']([[sys.executable, '-c', text] for text in programs], [{}] * len(programs), grace))
"""


def words(*programs, grace=60.0):
    return [sys.executable, '-c', DRIVER, str(LOCAL), json.dumps(programs), str(grace)]


def run(*programs, grace=60.0):
    return subprocess.run(words(*programs, grace=grace), capture_output=True, text=True, timeout=120)


def test_each_knows_its_place_and_finds_the_others():
    one, two = local['environments'](2, 4, {'XLA_FLAGS': '--some'})
    assert one['JAX_COORDINATOR_ADDRESS'] == two['JAX_COORDINATOR_ADDRESS']
    assert (one['JAX_PROCESS_ID'], two['JAX_PROCESS_ID']) == ('0', '1')
    assert {one['JAX_NUM_PROCESSES'], two['JAX_NUM_PROCESSES']} == {'2'}
    assert one['XLA_FLAGS'] == '--some --xla_force_host_platform_device_count=4'
    assert one['JAX_PLATFORMS'] == 'cpu'


@pytest.mark.parametrize(('visible', 'expected'), [(None, ['0,1', '2,3']), ('4,5,6,7', ['4,5', '6,7'])])
def test_gpus_are_dealt_out(visible, expected):
    environ = {'JAX_PLATFORMS': 'cuda'} | ({'CUDA_VISIBLE_DEVICES': visible} if visible else {})
    made = local['environments'](2, 2, environ)
    assert [one['CUDA_VISIBLE_DEVICES'] for one in made] == expected
    assert all('XLA_FLAGS' not in one for one in made)


def test_the_first_is_shown_as_it_is_and_the_others_by_their_number():
    ended = run('print("a")', 'import sys; print("b"); print("c", file=sys.stderr)')
    assert ended.returncode == 0
    assert sorted(ended.stdout.splitlines()) == ['[1] b', 'a']
    assert ended.stderr == '[1] c\n'


def test_the_first_bad_status_is_returned_and_ends_the_others():
    ended = run(WAITS, 'raise SystemExit(3)', grace=0.0)
    assert ended.returncode == 3
    assert ended.stderr.splitlines() == [
        'launch/local.py: process 1 ended with status 3; the others have 0 seconds to end',
        'launch/local.py: process 0 is killed',
    ]


def test_a_killed_process_has_its_signals_status():
    assert run('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'pass').returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ('number', 'program', 'status'), [(signal.SIGTERM, OBEYS, 143), (signal.SIGINT, WAITS, 128 + signal.SIGINT)]
)
def test_a_signal_goes_to_all(number, program, status):
    with subprocess.Popen(words(program, program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        assert sorted(one.stdout.readline() for _ in range(2)) == ['[1] ready\n', 'ready\n']
        one.send_signal(number)
        _, errors = one.communicate(timeout=120)
        assert one.returncode == status
        assert 'killed' not in errors


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a child of its parent')
def test_a_killed_launcher_takes_its_processes_along():
    with subprocess.Popen(words(OBEYS), stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout.readline() == 'ready\n'
        one.kill()
        assert one.stdout.read() == ''  # its end comes when the last that could write is gone


@pytest.mark.parametrize(('line', 'told'), [
    (['--processes', '2'], 'expected `--`'),
    (['--processes', '0', '--', '--config', 'x.py'], 'at least 1'),
    (['--', '--config', 'x.py'], '--processes'),
])  # fmt: skip
def test_what_is_missing_is_named(line, told, capsys):
    with pytest.raises(SystemExit) as error:
        local['main'](line)
    assert error.value.code == 2
    assert told in capsys.readouterr().err
