"""datatrove's local executor with processes that are watched: one that dies fails its phase at once, with its name."""

import contextlib
import copy
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from datatrove.executor import LocalPipelineExecutor

from jaxtune.data.prepare.engines import FORK_SERVER_OF
from jaxtune.errors import UserError

_POLL_SECONDS = 0.5  # between looks at what the driver itself was told
_PRELOADED = ('jaxtune.data.prepare.engines', 'jaxtune.data.prepare.phases', 'jaxtune.data.tokenizer')


class LocalExecutor(LocalPipelineExecutor):
    """Runs the tasks of a phase that are not done yet: one after the other in this process, or in several of their own.

    Raises:
      UserError: a process died; its task is named.
    """

    def run(self) -> None:
        """Runs them, and waits."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            whole = self.pipeline
            for rank in ranks:
                self.pipeline = copy.deepcopy(whole)
                self._run_for_rank(rank)
            return
        # Each worker has a core to itself already.
        with _environment(TOKENIZERS_PARALLELISM='false', **{FORK_SERVER_OF: str(os.getpid())}):
            _share(self, ranks, min(self.workers, len(ranks)))


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets environment variables that processes started inside inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Worker:
    """A process that runs one task after another, as they are handed to it.

    Attributes:
      pipe: takes a task's number, gives the exception that it ended with, or None.
      process: the process.
      rank: of the task that it is at; None = it waits for one.
    """

    def __init__(self, context: Any, executor: LocalExecutor) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(executor, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.rank: int | None = None

    def hand(self, rank: int) -> None:
        self.rank = rank
        with contextlib.suppress(OSError):  # where it is gone, taking its answer says so
            self.pipe.send(rank)

    def take(self, phase: str) -> None:
        """Takes the answer of its task, or finds out how it died."""
        try:
            problem = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5.0)
            raise UserError(
                f'{phase}: the worker of task {self.rank} {_ended(self.process.exitcode)}; fewer data.workers need '
                'less memory. The same command continues'
            ) from None
        if problem is not None:
            raise problem
        self.rank = None


def _ended(status: int | None) -> str:
    if status is None or status >= 0:
        return f'left with status {status}'
    try:
        return f'was killed by {signal.Signals(-status).name}'
    except ValueError:
        return f'was killed by signal {-status}'


def _share(executor: LocalExecutor, ranks: Sequence[int], count: int) -> None:
    """Runs tasks in so many processes; the first that fails ends them all."""
    # Forked from a process that has imported everything once, and never JAX, whose threads a fork would break.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(_PRELOADED))
    waiting = list(reversed(ranks))
    workers = [_Worker(context, executor) for _ in range(count)]
    task: Any = executor.pipeline[0]
    phase = task.name
    try:
        while waiting or any(worker.rank is not None for worker in workers):
            for worker in workers:
                if worker.rank is None and waiting:
                    worker.hand(waiting.pop())
            busy = {worker.pipe: worker for worker in workers if worker.rank is not None}
            for pipe in multiprocessing.connection.wait(list(busy), _POLL_SECONDS):
                busy[pipe].take(phase)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


def _serve(executor: LocalExecutor, pipe: Any) -> None:
    """What a worker does: tasks, until nobody hands it any."""
    while True:
        try:
            rank = pipe.recv()
        except EOFError:
            return
        problem: BaseException | None = None
        own = copy.deepcopy(executor)
        try:
            own._run_for_rank(rank)
        except Exception as error:
            problem = error
            problem.add_note(f'in task {rank}: {traceback.format_exc()}')
        try:
            pipe.send(problem)
        except Exception:  # an exception that cannot be sent
            pipe.send(RuntimeError(f'task {rank}: {traceback.format_exc()}'))
