"""The environment `python`: the model writes `<python>print(12 + 34)</python>`, and what that prints is added.

Each program runs alone in the sandbox of the reward `code`, and remembers nothing of those before. In a conversation a
call of the tool `python` is answered by a turn.
"""

from collections.abc import Mapping
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.rl import Environment, Problem, sandbox
from jaxtune.rl.tool_calls import asked, tool

_PRINTED = 1000  # characters of what is printed that are shown


def reset(problem: Problem) -> None:
    """There is nothing to remember."""


def step(state: Any, text: str, seconds: float, memory: int, unsafe: bool) -> tuple[Any, str | None, float, bool]:
    """What the program in a turn prints, and how it failed; a turn without one is the last.

    Raises:
      ValueError: programs cannot be run here.
    """
    question = asked(text, 'python', 'python', 'code')
    if question is None:
        return state, None, 0.0, True
    code, tagged = question
    outcome = sandbox.run(code.strip('\n'), [], sandbox.Limits(seconds, memory, unsafe), 4 * _PRINTED)
    if outcome.reason.startswith('unavailable: '):
        raise ValueError(outcome.reason)
    printed = outcome.printed.rstrip()
    printed = printed if len(printed) <= _PRINTED else f'{printed[:_PRINTED]}…'
    shown = '\n'.join(part for part in (printed, outcome.reason.removeprefix('failed: ')) if part)
    return state, f'\n<output>\n{shown}\n</output>\n' if tagged else shown, 0.0, False


def _limits(rl: Settings) -> Mapping[str, Any]:
    return {'seconds': rl.code_seconds, 'memory': rl.code_memory, 'unsafe': rl.code_unsafe}


ENVIRONMENT = Environment(
    'python',
    reset,
    step,
    stops=('</python>',),
    tools=(tool('python', 'Runs a Python program and returns what it prints.', 'code', 'the program'),),
    options=_limits,
    parallel=True,
)
