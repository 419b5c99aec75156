"""Commands run in forked children of a process that has imported everything, which takes them a tenth of the time.

Nothing of the program is changed for it: a child calls `jaxtune.main.main` with the words that a person would type.
"""

import contextlib
import dataclasses
import gc
import os
import pathlib
import pkgutil
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')
PROGRAM = pathlib.Path(__file__).resolve().parents[2] / 'jaxtune'
sys.path.insert(0, str(PROGRAM.parent))
MADE = pathlib.Path(os.environ.get('JAXTUNE_FUZZ', os.path.join(tempfile.gettempdir(), f'jaxtune-fuzz.{os.getuid()}')))
_SETTINGS = {
    'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false '
    '--xla_cpu_parallel_codegen_split_count=1',
    'JAX_COMPILATION_CACHE_DIR': str(MADE / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
}
# What acts when it is imported.
_STARTING = ('jaxtune.__main__',)
_USED = (
    'tensorboardX', 'pyarrow.parquet', 'trafilatura', 'warcio.archiveiterator', 'datatrove.executor',
    'datatrove.pipeline.filters', 'datatrove.pipeline.formatters', 'orbax.checkpoint', 'ftfy', 'lxml.html', 'datasets',
    'charset_normalizer', 'xxhash', 'jax.experimental.multihost_utils',
)  # fmt: skip
MEMORY = 6 << 30  # of a child: what would fill the machine fails instead


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
      status: its exit status; of a signal, less than 0.
      late: it was killed when its time was up.
      seconds, cpu: it took.
      stdout, stderr: what it wrote.
    """

    status: int
    late: bool
    seconds: float
    cpu: float
    stdout: str
    stderr: str


def preload() -> None:
    """Imports what runs need, without starting JAX's backends, whose threads a fork would lose."""
    os.environ.update(_SETTINGS)
    own = [module.name for module in pkgutil.walk_packages([str(PROGRAM)], 'jaxtune.')]
    for name in (*own, *_USED):
        if name not in _STARTING:
            with contextlib.suppress(ImportError):
                __import__(name)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind in ('llama', 'qwen2', 'gpt2', 'bert', 't5'):
        CONFIG_MAPPING[kind]  # imported when it is asked for
    # A child's collections of garbage would copy every page that it shares.
    gc.collect()
    gc.freeze()


def run(
    argv: Sequence[str | os.PathLike],
    folder: pathlib.Path,
    *,
    timeout: float = 60.0,
    memory: int = MEMORY,
    first: Callable[[], None] = lambda: None,
    kill_after: float | None = None,
    signal_to_send: int = signal.SIGKILL,
) -> Ended:
    """Runs the command with these words in a child, with `folder` as its current folder.

    Args:
      argv: the words behind the command's name.
      folder: holds `stdout` and `stderr` too, made anew.
      timeout: seconds until it is killed, with all that it started.
      memory: bytes of address space; 0 = no limit.
      first: called in the child before the command.
      kill_after: seconds until it gets a signal.
      signal_to_send: which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            _child([os.fspath(word) for word in argv], folder, memory, first)
        finally:
            os._exit(99)
    late = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        spent = time.monotonic() - began
        if kill_after is not None and spent > kill_after:
            os.kill(pid, signal_to_send)
            kill_after = None
        if spent > timeout:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it started and left
    texts = [(folder / name).read_text('utf-8', errors='replace') for name in ('stdout', 'stderr')]
    seconds = time.monotonic() - began
    return Ended(os.waitstatus_to_exitcode(status), late, seconds, usage.ru_utime + usage.ru_stime, *texts)


def call(function: Callable[[], None]) -> None:
    """Calls a function in a child, so that this process starts no backend."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError('what the cases are made of cannot be made')


def _child(argv: list[str], folder: pathlib.Path, memory: int, first: Callable[[], None]) -> None:
    for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = os.fdopen(1, 'w', buffering=1, encoding='utf-8')
    sys.stderr = os.fdopen(2, 'w', buffering=1, encoding='utf-8', errors='backslashreplace')
    os.chdir(folder)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 1
    try:
        from jaxtune import main

        first()
        status = main.main(['jaxtune', *argv])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
