"""Goodput: the share of a run's time that went into the updates that its weights are made of.

The time is that since the first start in the workdir, over all restarts, also while no process ran: a run that was
killed or preempted waits for its next start, and that costs as much as slow updates do. What it waits after a person
has stopped it (Ctrl-C), or after it was done and before it is asked for more steps, is not counted.

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


def continued(earlier: Mapping[str, Any], step: int, started: str) -> dict[str, float]:
    """The phases of earlier runs in a workdir, once a run goes on from the checkpoint of a step.

    Args:
      earlier: what they left in `run.json`: `phases`; `good`, the seconds of updates at each checkpoint, by its step;
        `ended`, when it was written, and `end`, how that run ended: `running` where it was killed.
      step: of the checkpoint; 0 where there is none.
      started: when this run started, in ISO 8601 as `ended` is.
    """
    phases = dict(earlier.get('phases', {}))
    spent = good(phases)
    kept = min(earlier.get('good', {}).get(str(step), spent) if step else 0.0, spent)
    for name in UPDATES:
        if name in phases and spent:
            phases[name] *= kept / spent
    for name, seconds in ((LOST, spent - kept), (DOWN, _between(earlier, started))):
        if seconds > 0:
            phases[name] = phases.get(name, 0.0) + seconds
    return phases


def _between(earlier: Mapping[str, Any], started: str) -> float:
    """Seconds between the end of the last run and the start of this one; 0 where nobody waited."""
    if 'ended' not in earlier or earlier.get('end', 'done') in _ASKED_FOR:
        return 0.0
    try:
        gap = datetime.datetime.fromisoformat(started) - datetime.datetime.fromisoformat(earlier['ended'])
    except (ValueError, TypeError):  # a damaged file, or one without a time zone
        return 0.0
    return max(gap.total_seconds(), 0.0)
