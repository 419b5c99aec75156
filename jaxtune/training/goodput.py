"""Goodput: the share of a run's time that went into the updates that its weights are made of.

The time is that since the first start in the workdir, over all restarts, also while no process ran: a run that was
killed or preempted waits for its next start, and that costs as much as slow updates do. The time after Ctrl-C,
and after the end of a run that is later asked for more steps, is not counted.

What counts is the time in updates: computing, and in reinforcement learning sampling and scoring too. What does not is
compiling, loading, evaluating, saving, exporting, waiting for data, and updates whose result was lost: those after the
checkpoint that the run went on from. (Google's ML Productivity Goodput, 2024, has the same parts.)
"""

import datetime
from collections.abc import Mapping
from typing import Any

# Phases of `RunInfo.timed` that are parts of an update.
UPDATES = ('step', 'generate', 'reward')
LOST, DOWN = 'lost', 'down'  # phases that are found out afterwards: updates done again, and time without a process

_ASKED_FOR = ('stopped', 'done')  # ends after which nobody waits for the next start


def good(phases: Mapping[str, float]) -> float:
    """Seconds of the phases that are parts of updates."""
    return sum(phases.get(name, 0.0) for name in UPDATES)


def continued(earlier: Mapping[str, Any], step: int, started: str, alive: float = 0.0) -> dict[str, Any]:
    """What earlier runs in a workdir come to, once a run goes on from the checkpoint of a step: `earlier`, changed.

    Args:
      earlier: what they left in `run.json`: `phases` and all `seconds`; `good`, the seconds of updates at each
        checkpoint, by its step; `ended`, when it was written, and `end`, how that run ended: `running` where it was
        killed.
      step: of the checkpoint; 0 where there is none.
      started: when this run started, in ISO 8601 as `ended` is.
      alive: when the last metrics were written, in seconds since 1970: a killed run was at work until then at least.
    """
    phases = dict(earlier.get('phases', {}))
    spent = good(phases)
    kept = min(earlier.get('good', {}).get(str(step), spent) if step else 0.0, spent)
    for name in UPDATES:
        if name in phases and spent:
            phases[name] *= kept / spent
    unseen, down = _between(earlier, started, alive)
    for name, seconds in ((LOST, spent - kept + unseen), (DOWN, down)):
        if seconds > 0:
            phases[name] = phases.get(name, 0.0) + seconds
    return {**earlier, 'phases': phases, 'seconds': earlier.get('seconds', 0.0) + unseen}


def _between(earlier: Mapping[str, Any], started: str, alive: float) -> tuple[float, float]:
    """From the last word of a run to the start of this one: seconds of work that was lost, and without any process."""
    if 'ended' not in earlier or earlier.get('end', 'done') in _ASKED_FOR:
        return 0.0, 0.0
    try:
        ended = datetime.datetime.fromisoformat(earlier['ended']).timestamp()
    except ValueError:  # a damaged file
        return 0.0, 0.0
    now = datetime.datetime.fromisoformat(started).timestamp()
    alive = min(max(alive, ended), max(now, ended))
    return alive - ended, max(now - alive, 0.0)
