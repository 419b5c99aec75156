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
# The launcher in a process of its own, over the programs that it is given.
DRIVER = """
import json, runpy, sys
local, programs = runpy.run_path(sys.argv[1]), json.loads(sys.argv[2])
sys.exit(local['run']([[sys.executable, '-c', text] for text in programs], [{}] * len(programs), 0.1))
"""


def run(*programs, grace=60.0):
    return local['run']([[sys.executable, '-c', text] for text in programs], [{}] * len(programs), grace)


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


def test_the_first_is_shown_as_it_is_and_the_others_by_their_number(capfd):
    assert run('print("a")', 'import sys; print("b"); print("c", file=sys.stderr)') == 0
    output, errors = capfd.readouterr()
    assert sorted(output.splitlines()) == ['[1] b', 'a']
    assert errors == '[1] c\n'


def test_the_first_bad_status_is_returned_and_ends_the_others(capfd):
    assert run(WAITS, 'raise SystemExit(3)', grace=0.0) == 3
    errors = capfd.readouterr().err.splitlines()
    assert errors[0] == 'launch/local.py: process 1 ended with status 3; the others have 0 seconds to end'
    assert errors[1] == 'launch/local.py: process 0 is killed'


def test_a_killed_process_has_its_signals_status():
    assert run('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'pass') == 128 + signal.SIGKILL


@pytest.mark.parametrize(('number', 'programs', 'status'), [
    (signal.SIGTERM, (OBEYS, OBEYS), 143),
    (signal.SIGINT, (WAITS, WAITS), 128 + signal.SIGINT),
])  # fmt: skip
def test_a_signal_goes_to_all(number, programs, status):
    words = [sys.executable, '-c', DRIVER, str(LOCAL), json.dumps(programs)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert sorted(launcher.stdout.readline() for _ in programs) == ['[1] ready\n', 'ready\n']
        launcher.send_signal(number)
        launcher.communicate(timeout=60)
        assert launcher.returncode == status


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a child of its parent')
def test_a_killed_launcher_takes_its_processes_along():
    words = [sys.executable, '-c', DRIVER, str(LOCAL), json.dumps([OBEYS])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == 'ready\n'
        launcher.kill()
        assert launcher.stdout.read() == ''  # its end comes when the last that could write is gone


@pytest.mark.parametrize(('words', 'told'), [
    (['--processes', '2'], 'expected `--`'),
    (['--processes', '0', '--', '--config', 'x.py'], 'at least 1'),
    (['--', '--config', 'x.py'], '--processes'),
])  # fmt: skip
def test_what_is_missing_is_named(words, told, capsys):
    with pytest.raises(SystemExit) as error:
        local['main'](words)
    assert error.value.code == 2
    assert told in capsys.readouterr().err
