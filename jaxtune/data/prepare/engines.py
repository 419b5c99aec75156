"""Where the phases run: datatrove's executors, on this machine, on a Ray cluster or through Slurm."""

import contextlib
import ctypes
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Phase, Work, shards
from jaxtune.errors import UserError

logger.disable('datatrove')  # an exception says what is wrong; a page of log beside it does not help

FORK_SERVER_OF = 'JAXTUNE_FORK_SERVER_OF'  # the process id of the driver, in the environment of its fork server
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


class Task(PipelineStep):
    """A phase as datatrove runs it.

    Args:
      phase: what to do.
      work: the folder between the phases, and the plan.
    """

    type = 'jaxtune'

    def __init__(self, phase: Phase, work: Work) -> None:
        self.name = phase.name
        super().__init__()
        self.phase, self.work = phase, work
        self.current, self.path = os.getcwd(), [os.path.abspath(entry) for entry in sys.path]

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Does the task of a number, in the folder and with the modules of the process that planned it."""
        console.quiet_logs()
        sys.path += [entry for entry in self.path if entry not in sys.path and os.path.exists(entry)]
        if os.path.isdir(self.current) and os.getcwd() != self.current:
            os.chdir(self.current)
        try:
            self.phase.run(self.work, rank)
        except UserError as error:
            shards.write_text(_refusals(self.phase, self.work) / f'{rank:05d}', str(error))
            raise


def _logs(phase: Phase, work: Work) -> pathlib.Path:
    return work.folder / 'logs' / phase.name


def _refusals(phase: Phase, work: Work) -> pathlib.Path:
    """Where tasks leave the message of their `UserError`: not every engine hands the exception itself on."""
    return _logs(phase, work) / 'refused'


def built(work: Work) -> bool:
    """Whether the last phase was done, by whatever ran it."""
    return (work.folder / 'logs' / 'build' / 'completions').is_dir()


def run(phase: Phase, work: Work, engine: str, workers: int) -> None:
    """Runs all tasks of a phase that are not done yet, and waits for them.

    Args:
      phase: what to do.
      work: the folder between the phases, and the plan.
      engine: `local` or `ray`.
      workers: tasks at once.

    Raises:
      UserError: a task says what is wrong with the recipe or the data.
      RuntimeError: a task failed.
    """
    logs, count = _logs(phase, work), phase.tasks(work)
    shutil.rmtree(_refusals(phase, work), ignore_errors=True)
    executor = (_ray if engine == 'ray' else _local)(Task(phase, work), count, logs, min(workers, count))
    try:
        with _progress(phase.name, count, logs / 'completions'):
            executor.run()
    except Exception:
        _refuse(phase, work)
        raise
    left = executor.get_incomplete_ranks(skip_completed=True)
    if left:
        _refuse(phase, work)
        raise RuntimeError(f'{phase.name}: {len(left)} of {count} tasks failed, the first is {left[0]}: see {logs}')


def _refuse(phase: Phase, work: Work) -> None:
    """Says what a task found wrong with the recipe or the data, whatever exception came of it."""
    if refused := sorted(_refusals(phase, work).glob('[0-9]*')):
        raise UserError(refused[0].read_text(encoding='utf-8')) from None


def _local(task: Task, count: int, logs: pathlib.Path, workers: int) -> PipelineExecutor:
    from jaxtune.data.prepare.workers import LocalExecutor  # slow to import: worker processes do without

    return LocalExecutor([task], tasks=count, workers=workers, logging_dir=str(logs))


def _ray(task: Task, count: int, logs: pathlib.Path, workers: int) -> PipelineExecutor:
    import ray  # pyright: ignore[reportMissingImports]: an extra of its own
    from datatrove.executor import RayPipelineExecutor  # of the data extra

    if not ray.is_initialized():
        root = str(pathlib.Path(__file__).resolve().parents[3])
        environment = {
            'env_vars': {'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]).rstrip(':')}
        }
        environment['env_vars']['TOKENIZERS_PARALLELISM'] = 'false'
        arguments: dict[str, Any] = {'runtime_env': environment, 'log_to_driver': False, 'include_dashboard': False}
        if os.environ.get('RAY_ADDRESS'):
            del arguments['include_dashboard']
        else:
            arguments['num_cpus'] = max(workers, 1)
        ray.init(logging_level='ERROR', **arguments)
    return RayPipelineExecutor([task], tasks=count, workers=workers, logging_dir=str(logs), mem_per_cpu_gb=0.5)


@contextlib.contextmanager
def _progress(name: str, count: int, folder: pathlib.Path) -> Iterator[None]:
    """A bar that counts the marks which finished tasks leave in a folder."""

    def done() -> int:
        return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0

    stop, seen = threading.Event(), done()

    def watch() -> None:
        shown = seen
        while True:
            ended = stop.wait(_POLL_SECONDS)
            if (now := done()) > shown:
                bar.advance(now - shown)
                shown = now
            if ended:
                return

    with console.progress(count, name, 'task', initial=seen) as bar:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def submit(phases: list[Phase], work: Work, settings: Settings, workers: int) -> list[pathlib.Path]:
    """Hands all phases to Slurm, each to begin when the one before is done; returns the scripts.

    Args:
      phases: the pipeline.
      work: the folder between the phases, and the plan.
      settings: `data.slurm`.
      workers: tasks of a phase at once; 0 = as many as Slurm runs.

    With `settings.dry_run` the scripts are written, and nothing is submitted.

    Raises:
      UserError: no partition, or no `sbatch` here.
    """
    from datatrove.executor import SlurmPipelineExecutor  # of the data extra

    if not settings.partition:
        raise UserError("data.slurm.partition='': expected the name of a partition (data.engine=slurm)")
    if not settings.dry_run and shutil.which('sbatch') is None:
        raise UserError(
            'data.engine=slurm: no sbatch on this machine; expected a login node, or data.slurm.dry_run=True'
        )

    names = [f'jaxtune-{phase.name}' for phase in phases]

    class DryRun(SlurmPipelineExecutor):
        """Writes what it would submit."""

        job_id = None

        def launch_job(self) -> None:
            number = str(names.index(self.job_name) + 1)
            if self.depends is not None:
                self.depends_job_id = self.depends.job_id
            script = self.get_launch_file_contents(
                self.get_sbatch_args(self.tasks),
                f'srun -l -n 1 launch_pickled_pipeline {self.logging_dir.resolve_paths("executor.pik")}',
            )
            head = f'#!/bin/bash\n#SBATCH --dependency={self.dependency}' if self.dependency else '#!/bin/bash'
            with self.logging_dir.open('launch_script.slurm', 'w') as file:
                file.write(script.replace('#!/bin/bash', head, 1))
            self.job_id = f'JOB{number}'

    kind = DryRun if settings.dry_run else SlurmPipelineExecutor
    root = pathlib.Path(__file__).resolve().parents[3]
    setup = settings.setup or f'export PATH={pathlib.Path(sys.executable).parent}:$PATH PYTHONPATH={root}:$PYTHONPATH'
    scripts, before = [], None
    for phase in phases:
        logs = _logs(phase, work)
        before = kind(
            [Task(phase, work)],
            tasks=phase.tasks(work),
            time=settings.time,
            partition=settings.partition,
            mem_per_cpu_gb=settings.memory_gb,
            workers=workers or -1,
            job_name=f'jaxtune-{phase.name}',
            qos='',
            env_command=setup,
            logging_dir=str(logs),
            slurm_logs_folder=str(logs / 'slurm'),
            depends=before,
        )
        if settings.dry_run:
            before.launch_job()
        scripts.append(logs / 'launch_script.slurm')
    if before is not None and not settings.dry_run:
        before.run()
    return scripts


def _end_with(driver: int) -> None:
    """Ends this process, the fork server, when its driver does, even by SIGKILL, and with it all that it forked.

    Left to itself, its children keep it alive and wait for work for ever.
    """
    if sys.platform != 'linux':
        return
    libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if os.environ.get(FORK_SERVER_OF) == str(os.getppid()):
    _end_with(os.getppid())
