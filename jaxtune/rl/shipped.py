"""The rewards that are shipped, by name, and the short ones: `format`, `exact`, `length`. `rl.reward` names them."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.common.settings import Settings

_TAGS = re.compile(r'\w+(?:,\w+)*')


@dataclasses.dataclass(frozen=True)
class ShippedReward:
    """A reward that a recipe names by a word.

    Attributes:
      place: `module:function` of `completions`, `references`, and what `options` says.
      options: what of the recipe's `rl` it is given, by name.
      references: it needs the answers of the records.
      parallel: completions may be divided over several processes.
    """

    place: str
    options: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}
    references: bool = False
    parallel: bool = False


SHIPPED: Mapping[str, ShippedReward] = {
    'math': ShippedReward('jaxtune.rl.math_answers:score', references=True, parallel=True),
    'code': ShippedReward(
        'jaxtune.rl.code_reward:score',
        lambda rl: {'seconds': rl.code_seconds, 'memory': rl.code_memory, 'unsafe': rl.code_unsafe},
        references=True,
    ),
    'exact': ShippedReward('jaxtune.rl.shipped:exact', references=True),
    'format': ShippedReward('jaxtune.rl.shipped:formatted', lambda rl: {'pattern': rl.format_pattern}, parallel=True),
    'length': ShippedReward('jaxtune.rl.shipped:short', lambda rl: {'target': rl.length_target}),
}


def exact(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each completion that is the reference, but for white space around both; else 0."""
    return [float(text.strip() == other.strip()) for text, other in zip(completions, references, strict=True)]


def short(completions: Sequence[str], target: int) -> list[float]:
    """1 for each completion of at most `target` characters, falling evenly to 0 at twice as many."""
    return [min(1.0, max(0.0, 2.0 - len(text) / target)) for text in completions]


def formatted(completions: Sequence[str], pattern: str) -> list[float]:
    """1 for each completion that has the tags, or that the whole of a regular expression matches; else 0.

    Args:
      completions: texts.
      pattern: names of tags, such as `think,answer`: the text begins with `<think>…</think>`, `<answer>…</answer>`
        follows, and each is there once; or a regular expression, whose dot matches line ends too.
    """
    if _TAGS.fullmatch(pattern):
        return [float(_has_tags(text, pattern.split(','))) for text in completions]
    expression = re.compile(pattern, re.DOTALL)
    return [float(expression.fullmatch(text) is not None) for text in completions]


def _has_tags(text: str, tags: Sequence[str]) -> bool:
    if any(text.count(mark) != 1 for tag in tags for mark in (f'<{tag}>', f'</{tag}>')):
        return False
    rest = text
    for tag in tags:
        before, _, rest = rest.partition(f'<{tag}>')
        if before.strip() or f'</{tag}>' not in rest:
            return False
        rest = rest.partition(f'</{tag}>')[2]
    return True
