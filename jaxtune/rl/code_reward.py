"""The reward `code`: whether the program in a completion passes the tests of its record, in a sandbox.

The record's answer holds the tests: Python text (`assert add(1, 2) == 3`), a JSON list of such texts, or a JSON object
`{"inputs": [...], "outputs": [...]}` of what the program is given on stdin and must print.
"""

import concurrent.futures
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from jaxtune.rl import sandbox

_FENCED = re.compile(r'```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n```|\Z)', re.DOTALL)


def score(
    completions: Sequence[str], references: Sequence[str], seconds: float, memory: int, unsafe: bool
) -> list[float]:
    """1 for each completion whose program passes all tests of its reference, else 0; several at a time.

    Raises:
      ValueError: a reference holds no tests, or programs cannot be run here.
    """
    limits = sandbox.Limits(seconds, memory, unsafe)
    jobs = [(program(text), tests(reference)) for text, reference in zip(completions, references, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(at_once()) as pool:
        outcomes = list(pool.map(lambda job: sandbox.run(job[0], job[1], limits), jobs))
    for outcome in outcomes:
        if outcome.reason.startswith('unavailable: '):
            raise ValueError(outcome.reason)
    return [float(outcome.passed) for outcome in outcomes]


def at_once() -> int:
    """How many programs run at a time: one a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def program(text: str) -> str:
    """The last fenced block of Python of a text, else its last fenced block, else all of it."""
    text = text.rpartition('</think>')[2]
    blocks = _FENCED.findall(text)
    of_python = [code for language, code in blocks if language.lower() in ('python', 'python3', 'py')]
    return of_python[-1] if of_python else blocks[-1][1] if blocks else text


def tests(reference: str) -> list[dict[str, Any]]:
    """The tests of a record, as `sandbox.run` takes them.

    Raises:
      ValueError: there is none, or JSON that is something else.
    """
    expected = 'expected tests: Python text, a JSON list of such, or {"inputs": [...], "outputs": [...]}'
    try:
        value = json.loads(reference)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        inputs, outputs = (value.get(name) for name in ('inputs', 'outputs'))
        given = [one if isinstance(one, list) else [] for one in (inputs, outputs)]
        pairs = list(zip(*given, strict=False))
        if not pairs or len(given[0]) != len(given[1]) or not all(isinstance(x, str) for pair in pairs for x in pair):
            raise ValueError(f'the answer of a record holds {reference[:60]!r}; {expected}')
        return [{'input': given, 'output': printed} for given, printed in pairs]
    if isinstance(value, list) and value and all(isinstance(test, str) for test in value):
        return [{'code': test} for test in value]
    if not reference.strip() or isinstance(value, list):
        raise ValueError(f'the answer of a record holds {reference[:60]!r}; {expected}')
    return [{'code': reference}]
