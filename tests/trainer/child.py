"""The command in a process of its own, forked from one that has imported everything: what a start costs is the run.

`python -m jaxtune.main` itself is started by `test_pod.py`.
"""

import atexit
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence

# Forked from a server without threads or devices, never from pytest's own process.
_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload(['jaxtune.tasks.train', 'child'])


def _run(
    words: Sequence[str], devices: int, outputs: tuple[str, str], compiled: pathlib.Path, environment: Mapping[str, str]
) -> None:
    for descriptor, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
    os.environ['XLA_FLAGS'] += f' --xla_force_host_platform_device_count={devices}'  # XLA takes the last
    os.environ.update(environment)
    import jax

    from jaxtune import main

    # Only the first run writes: one that is killed may leave half a file.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9 if compiled.exists() else 0)
    jax.config.update('jax_compilation_cache_dir', str(compiled))
    try:
        status = main.main(['jaxtune', *words])
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without them
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(status)


class Child:
    """A started command, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self, words: Sequence[str], folder: pathlib.Path, devices: int, environment: Mapping[str, str] | None = None
    ):
        self.outputs = tuple(str(folder / f'{name}-{time.monotonic_ns()}') for name in ('stdout', 'stderr'))
        args = (list(map(str, words)), devices, self.outputs, folder / f'compiled-{devices}', environment or {})
        self.process = _SERVER.Process(target=_run, args=args)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; returns what it wrote.

        Raises:
          TimeoutError: it has not ended in so many seconds; it is killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f'the command has not ended after {timeout} seconds')
        return tuple(pathlib.Path(path).read_text() if os.path.exists(path) else '' for path in self.outputs)
