#!/usr/bin/env python3
"""Starts several processes of one run on this machine, as so many hosts would.

    python launch/local.py --processes 2 --devices-per-process 4 -- --config RECIPE.py [--config.KEY=VALUE ...]

What stands after `--` goes to `python -m jaxtune.main`, with the Python that runs this. Devices are parts of the CPU;
with `JAX_PLATFORMS=cuda` each process has so many GPUs. The output of process 0 is shown as it is, lines of the others
begin with their number. Ctrl-C and SIGTERM go to all of them. Where one ends badly, the others have `--grace` seconds
to end by themselves, and are killed then. The exit status is the first bad one, 128 + n for signal n, else 0.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

_POLL_SECONDS = 0.05


def environments(processes: int, devices: int, environ: Mapping[str, str] = os.environ) -> list[dict[str, str]]:
    """What is set in each process beside what it inherits, so that they find each other on this machine.

    Args:
      processes: how many.
      devices: of each.
      environ: what they inherit; `JAX_PLATFORMS` says of which kind the devices are, `cpu` where it says nothing.
    """
    platform = environ.get('JAX_PLATFORMS') or 'cpu'
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    made = []
    for process in range(processes):
        one = {
            'JAX_PLATFORMS': platform,
            'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
            'JAX_NUM_PROCESSES': str(processes),
            'JAX_PROCESS_ID': str(process),
        }
        if platform == 'cpu':  # of a flag that is given twice XLA takes the last
            flag = f'--xla_force_host_platform_device_count={devices}'
            one['XLA_FLAGS'] = f'{environ.get("XLA_FLAGS", "")} {flag}'.strip()
        else:
            visible = environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(processes * devices)))
            own = visible.split(',')[process * devices : (process + 1) * devices]
            one['CUDA_VISIBLE_DEVICES'] = ','.join(own)
        made.append(one)
    return made


def run(commands: Sequence[Sequence[str]], settings: Sequence[Mapping[str, str]], grace: float) -> int:
    """Runs the commands at once until all have ended; returns the first bad exit status, else 0.

    Args:
      commands: words of each.
      settings: what is set in the environment of each.
      grace: seconds that the others have after one has ended badly.
    """
    started: list[subprocess.Popen] = []
    early: list[int] = []  # signals that came before all were started

    def forward(number: int, frame: object) -> None:
        early.append(number)
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        readers = []
        for number, (command, own) in enumerate(zip(commands, settings, strict=True)):
            pipe = subprocess.PIPE if number else None
            process = subprocess.Popen(
                command,
                env=os.environ | own,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C comes from here alone, and once
                preexec_fn=_end_with_parent if sys.platform == 'linux' else None,
                stdout=pipe,
                stderr=pipe,
            )
            started.append(process)
            for source, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                if source is not None:
                    readers.append(threading.Thread(target=_copy, args=(source, to, number), daemon=True))
                    readers[-1].start()
            for signum in early:
                process.send_signal(signum)
        status = _wait(started, grace)
        for reader in readers:
            reader.join(1.0)  # a worker of a killed process may hold its pipe
        return status
    finally:
        for process in started:
            _kill(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen], grace: float) -> int:
    """Waits for all of them, of which those that outlive another's bad end too long are killed."""
    status, deadline = 0, float('inf')
    running = list(processes)
    while running:
        for process in list(running):
            if (code := process.poll()) is None:
                if time.monotonic() > deadline:
                    print(f'launch/local.py: process {processes.index(process)} is killed', file=sys.stderr)
                    _kill(process)
                continue
            running.remove(process)
            if code and not status:
                status, deadline = code if code > 0 else 128 - code, time.monotonic() + grace
                if running and status not in (130, 143):  # all of them stop then, and one is the first
                    print(
                        f'launch/local.py: process {processes.index(process)} ended with status {status}; '
                        f'the others have {grace:g} seconds to end',
                        file=sys.stderr,
                    )
        time.sleep(_POLL_SECONDS)
    return status


def _kill(process: subprocess.Popen) -> None:
    """Kills a process that still runs, with the workers that it has started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """In the child: SIGTERM comes when the launcher is gone, so that no run goes on unseen."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _copy(source: IO[bytes], to: IO[str], number: int) -> None:
    for line in source:
        to.write(f'[{number}] {line.decode(errors="replace").rstrip()}\n')
        to.flush()


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text}: expected a number of at least 1')
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Runs one command line; returns its exit status."""
    cut = argv.index('--') if '--' in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog='launch/local.py', usage='%(prog)s --processes N --devices-per-process M -- ARGUMENTS of jaxtune.main'
    )
    parser.add_argument('--processes', type=_at_least_one, required=True, help='how many processes one run has')
    parser.add_argument('--devices-per-process', type=_at_least_one, default=1, help='devices of each, default 1')
    parser.add_argument('--grace', type=float, default=30.0, help='seconds for the others after a bad end, default 30')
    options = parser.parse_args(argv[:cut])
    rest = argv[cut + 1 :]
    if not rest:
        parser.error('expected `--` and the arguments of jaxtune.main: -- --config RECIPE.py')
    command = [sys.executable, '-m', 'jaxtune.main', *rest]
    settings = environments(options.processes, options.devices_per_process)
    return run([command] * options.processes, settings, options.grace)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
