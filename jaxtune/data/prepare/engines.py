"""Where the phases run: datatrove's executors, on this machine, on a Ray cluster or through Slurm."""

import os
import pathlib
import shutil
import sys
import threading
from typing import Any

from ml_collections import ConfigDict

from jaxtune.common import console
from jaxtune.data.prepare.phases import Phase
from jaxtune.errors import UserError

_POLL_SECONDS = 0.2


def run(phase: Phase, engine: str, workers: int) -> None:
    """Runs all tasks of a phase that are not done yet, and waits for them.

    Args:
      phase: what to do.
      engine: `local` or `ray`.
      workers: tasks at once.

    Raises:
      UserError: a task says what is wrong with the recipe or the data.
      RuntimeError: a task failed.
    """
    logs = phase.logs
    workers = min(workers, phase.count)
    shutil.rmtree(phase.refusals, ignore_errors=True)
    executor = (_ray if engine == 'ray' else _local)(phase, logs, workers)
    try:
        with _progress(phase, logs / 'completions'):
            executor.run()
    except Exception:
        _refuse(phase)
        raise
    left = executor.get_incomplete_ranks(skip_completed=True)
    if left:
        _refuse(phase)
        raise RuntimeError(
            f'{phase.name}: {len(left)} of {phase.count} tasks failed, the first is {left[0]}: see {logs}'
        )


def _refuse(phase: Phase) -> None:
    """Says what a task found wrong with the recipe or the data, whatever exception came of it."""
    if refused := sorted(phase.refusals.glob('[0-9]*')):
        raise UserError(refused[0].read_text(encoding='utf-8')) from None


def _local(phase: Phase, logs: pathlib.Path, workers: int):
    from jaxtune.data.prepare.workers import LocalExecutor

    return LocalExecutor([phase], tasks=phase.count, workers=workers, logging_dir=str(logs))


def _ray(phase: Phase, logs: pathlib.Path, workers: int):
    import ray
    from datatrove.executor import RayPipelineExecutor

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
    return RayPipelineExecutor([phase], tasks=phase.count, workers=workers, logging_dir=str(logs), mem_per_cpu_gb=0.5)


class _progress:  # noqa: N801
    """A bar that counts the marks which finished tasks leave."""

    def __init__(self, phase: Phase, folder: pathlib.Path):
        self.phase, self.folder, self.stop = phase, folder, threading.Event()

    def _done(self) -> int:
        return sum(1 for _ in self.folder.iterdir()) if self.folder.is_dir() else 0

    def __enter__(self) -> None:
        done = self._done()
        self.bar = console.progress(self.phase.count, self.phase.name, 'task', initial=done)
        bar = self.bar.__enter__()

        def watch():
            seen = done
            while True:
                ended = self.stop.wait(_POLL_SECONDS)
                if (now := self._done()) > seen:
                    bar.advance(now - seen)
                    seen = now
                if ended:
                    return

        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.stop.set()
        self.thread.join()
        self.bar.__exit__(*error)


def submit(phases: list[Phase], settings: ConfigDict, workers: int) -> list[pathlib.Path]:
    """Hands all phases to Slurm, each to begin when the one before is done; returns the scripts.

    With `settings.dry_run` the scripts are written, and nothing is submitted.

    Raises:
      UserError: no partition, or no `sbatch` here.
    """
    from datatrove.executor import SlurmPipelineExecutor

    if not settings.partition:
        raise UserError("data.slurm.partition='': expected the name of a partition (data.engine=slurm)")
    if not settings.dry_run and shutil.which('sbatch') is None:
        raise UserError(
            'data.engine=slurm: no sbatch on this machine; expected a login node, or data.slurm.dry_run=True'
        )

    class DryRun(SlurmPipelineExecutor):
        """Writes what it would submit."""

        job_id = None

        def launch_job(self):
            number = str(phases.index(self.pipeline[0]) + 1)
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
        logs = phase.logs
        before = kind(
            [phase],
            tasks=phase.count,
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
    if not settings.dry_run:
        before.run()
    return scripts
