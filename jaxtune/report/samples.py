"""The samples of a run: those of its newest step, and a few prompts that are followed from step to step."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.report.sections import number
from jaxtune.report.source import Source

_SHOWN, _MOST, _MOST_CHARS = 6, 40, 2000
_FOLLOWED, _STEPS = 4, 5  # prompts that are followed, and answers to each


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and what was answered.

    Attributes:
      heads: lines above it.
      prompt: the text.
      completion: what follows it, at most so many characters.
      cut: how many characters more there are.
      answers: `(name, text)` of several answers, where there are; `completion` is one of them.
    """

    heads: list[str]
    prompt: str
    completion: str
    cut: int
    answers: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a run.

    Attributes:
      title: of those of the newest step.
      first: those that are shown.
      more: those that are folded.
      left_out: how many are not there at all.
      followed: a few prompts with their answers at successive steps.
    """

    title: str
    first: list[Sample]
    more: list[Sample]
    left_out: int
    followed: list[Sample]


def samples(source: Source) -> Samples | None:
    """The samples of the newest step; where there are several steps, beside those of the first one."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for row in source.samples:
        by_step.setdefault(row.get('step') or 0, []).append(row)
    if not by_step:
        return None
    rows, before = by_step[max(by_step)], by_step[min(by_step)]
    if before is not rows and len(before) == len(rows):
        rows = [{**row, 'before': first.get('completion')} for row, first in zip(rows, before, strict=True)]
    shown = [_sample(row) for row in rows[:_MOST]]
    title = 'Before training and after' if any('before' in row for row in rows) else 'Samples, each after its prompt'
    return Samples(title, shown[:_SHOWN], shown[_SHOWN:], len(rows) - len(shown), followed(by_step))


def followed(by_step: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Sample]:
    """The first prompts that are the same at every step, with their answers at a few of the steps in order.

    Args:
      by_step: the rows of `samples.jsonl`; of less than three steps nothing is followed.
    """
    steps = sorted(by_step)
    if len(steps) < 3:
        return []
    count = min(len(steps), _STEPS)
    chosen = [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)]
    found = []
    for rows in zip(*(by_step[step] for step in chosen), strict=False):
        if len({plain(row.get('prompt')) for row in rows}) > 1 or len(found) == _FOLLOWED:
            break
        answers = [
            (', '.join([f'step {step:,}', *_score(row)]), plain(row.get('completion'))[:_MOST_CHARS])
            for step, row in zip(chosen, rows, strict=True)
        ]
        found.append(dataclasses.replace(_sample(rows[-1]), heads=[], answers=answers))
    return found


def _sample(row: Mapping[str, Any]) -> Sample:
    prompt, completion = plain(row.get('prompt')), plain(row.get('completion'))
    cut = max(0, len(completion) - _MOST_CHARS)
    completion = completion[:_MOST_CHARS]
    if len(prompt) > _MOST_CHARS:
        prompt = '… ' + prompt[-_MOST_CHARS:]
    heads = [*([str(row['adapter'])] if 'adapter' in row else []), *_score(row)]
    answers: list[tuple[str, str]] = []
    if 'before' in row:
        several = [('before', row['before']), ('after', completion), ('expected', row.get('reference'))]
        answers = [(name, plain(answer)[:_MOST_CHARS]) for name, answer in several if answer is not None]
    return Sample(heads, prompt, completion, cut, answers)


def _score(row: Mapping[str, Any]) -> list[str]:
    score = row.get('score')
    return [f'score {number(score)}'] if isinstance(score, int | float) and math.isfinite(score) else []


def plain(value: Any) -> str:
    """A prompt as text: as it is, or a conversation turn by turn."""
    if isinstance(value, list):
        turns = (f'{turn.get("role", "")}: {turn.get("content", "")}' for turn in value if isinstance(turn, dict))
        return '\n'.join(turns) + '\n'
    return '' if value is None else str(value)
