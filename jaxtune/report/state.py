"""How far the run of a workdir has come."""

import dataclasses
import fcntl
import pathlib

from jaxtune.common.io import read_mapping
from jaxtune.metrics.writer import read_metrics
from jaxtune.recipe import ownership


@dataclasses.dataclass(frozen=True)
class State:
    """How far a run has come.

    Attributes:
      word: `done`, `running`, `stopped`, or `not begun`.
      step: the last update that is logged, or saved.
      steps: updates of the whole run; 0 where it has none.
    """

    word: str
    step: int
    steps: int

    def __str__(self) -> str:
        """`done`, `running, 300 of 1,000`."""
        at = self.steps and self.word in ('running', 'stopped')
        return f'{self.word}, {self.step:,} of {self.steps:,}' if at else self.word


def state_of(workdir: pathlib.Path) -> State:
    """The state of the run in a workdir; what a process of this machine holds is running."""
    result, recipe = read_mapping(workdir / 'result.json') or {}, read_mapping(workdir / ownership.RECIPE) or {}
    rows = list(read_metrics(workdir / 'metrics.jsonl'))
    step = max([0, *(row['step'] for row in rows[-1:]), *ownership.steps(workdir)[-1:]])
    steps = (recipe.get('train') or {}).get('steps') or 0
    if _held(workdir):
        return State('running', step, steps)
    if result.get('status') == 'done':
        return State('done', result.get('step') or step, steps)
    return State('stopped' if ownership.begun(workdir) or rows else 'not begun', step, steps)


def _held(workdir: pathlib.Path) -> bool:
    """Whether a process holds the workdir's lock."""
    try:
        with (workdir / ownership.MARK).open('rb') as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
