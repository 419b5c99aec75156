"""Reinforcement learning: a policy answers prompts, a reward scores the answers, and losses learn from both.

A new algorithm is a module here with an `Algorithm`, and a line in `ALGORITHMS`; a recipe may name another as its task,
`module:NAME`. So is an `Environment`, which a recipe names by `rl.environment`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxtune.common.registry import Registry

# The names below are a recipe's choices, which are checked before anything slow is imported.
if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxtune.common.settings import Settings

Sums = tuple['jax.Array', 'jax.Array', dict[str, Any]]


class RolloutBatch(NamedTuple):
    """A batch of answers, and what the policy that wrote them, the reference and the reward say of them.

    Attributes:
      old: `[answers, width]` float32, the policy's log-probability of each token of an answer; 0 after its end.
      reference: `[answers, width]`, the reference's; `old` for an algorithm that asks none.
      values: `[answers, width]`, the value head's before each token was written; 0 without a head.
      mask: `[answers, width]`, 1 where the answer has a token, else 0.
      scores: `[answers]` float32, the reward of each.
    """

    old: jax.Array
    reference: jax.Array
    values: jax.Array
    mask: jax.Array
    scores: jax.Array


class LossOf(Protocol):
    """A loss over the answers' tokens.

    Args are the recipe's `rl` subtree; `[rows, length]` float32 log-probabilities of the policy as it is now, at the
    place before each token and 0 outside the answers; the value head's outputs likewise; and the batch: what
    `RolloutPacker.fields` makes, and the algorithm's token fields. Returns the sum, the count, and sums of metrics.
    """

    def __call__(self, settings: Settings, logps: jax.Array, values: jax.Array, batch: Mapping[str, jax.Array]) -> Sums:
        """See the class."""
        ...


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A way to learn from rewards. Its functions get the recipe's `rl` subtree.

    Attributes:
      name: what a recipe calls it; its metrics are `NAME/…`.
      token_fields: numbers `[answers, width]` for each token that the loss reads, made by `compute_advantages`.
      compute_advantages: `(settings, rollouts) -> (fields, metrics)`.
      loss: of a batch of rows.
      group: how many answers each prompt gets; those of one prompt follow each other.
      value_head: whether its model has one.
      reference: whether it asks what the policy of the start says; if not, none is held.
      titles: of its own metrics, for the report.
      higher_is_better: those of its own metrics of which a higher value is better.
      adapted: which of the attributes above are others for a recipe's `rl`, `{name: value}`.
    """

    name: str
    token_fields: tuple[str, ...]
    compute_advantages: Callable[[Settings, RolloutBatch], tuple[dict[str, jax.Array], dict[str, jax.Array]]]
    loss: LossOf
    group: Callable[[Settings], int] = lambda settings: 1
    value_head: bool = False
    reference: bool = True
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    higher_is_better: tuple[str, ...] = ()
    adapted: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}


ALGORITHMS = Registry(
    'task',
    Algorithm,
    {
        'ppo': 'jaxtune.rl.ppo:ALGORITHM',
        'grpo': 'jaxtune.rl.grpo:ALGORITHM',
    },
)


class Problem(NamedTuple):
    """What an environment begins with.

    Attributes:
      prompt: a text, or the turns of a conversation, `{"role", "content"}`.
      reference: the text that the record holds as its answer, or None.
    """

    prompt: Any
    reference: str | None = None


@dataclasses.dataclass(frozen=True)
class Environment:
    """What answers the turns of a policy: a tool, a game. Its functions run in a process of their own.

    A turn of the policy ends with one of the `stops`, after which the reply goes on in the same turn, or with what ends
    an answer, after which the reply is a turn of its own, as the chat template of a conversation writes one. Nothing
    that it writes is learnt.

    Attributes:
      name: for messages.
      reset: `(problem) -> state`, of JSON values, in which an exchange begins.
      step: `(state, text, **options) -> (state, reply, reward, done)`, of the text of a turn. A reply of None adds
        nothing: after a stop the policy goes on, else the exchange is over. One that is `done` adds nothing either.
      stops: texts that end a turn.
      role: of the turn that a reply is: `tool` or `user`.
      tools: JSON schemas of what may be called, for chat templates that take tools.
      options: what of the recipe's `rl` a step is given, by name.
      references: whether it needs the answers of the records.
      parallel: steps may run several at a time, in threads.
    """

    name: str
    reset: Callable[[Problem], Any]
    step: Callable[..., tuple[Any, str | None, float, bool]]
    stops: tuple[str, ...] = ()
    role: str = 'tool'
    tools: tuple[Mapping[str, Any], ...] = ()
    options: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}
    references: bool = False
    parallel: bool = False


ENVIRONMENTS = Registry(
    'rl.environment',
    Environment,
    {
        'calculator': 'jaxtune.rl.calculator:ENVIRONMENT',
        'python': 'jaxtune.rl.python_tool:ENVIRONMENT',
        'guess': 'jaxtune.rl.guess:ENVIRONMENT',
    },
)


Score = Callable[[Sequence[Any], Sequence[str]], 'np.ndarray']


@dataclasses.dataclass(frozen=True)
class RewardPart:
    """One of several rewards.

    Attributes:
      name: in metrics and messages.
      weight: that its scores have in the sum.
      score: as `Reward.score`.
    """

    name: str
    weight: float
    score: Score


@dataclasses.dataclass(frozen=True)
class Reward:
    """What scores answers.

    Attributes:
      name: for messages.
      score: `(prompts, completions) -> [answers]` float32.
      parts: what it is the weighted sum of, where the recipe gives several or weights.
      references: whether it needs the answers of the records.
    """

    name: str
    score: Score
    parts: tuple[RewardPart, ...] = ()
    references: bool = False

    def scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The reward of each answer, and those of its parts by name, before their weights."""
        if not self.parts:
            return self.score(prompts, completions), {}
        by_part = {part.name: part.score(prompts, completions) for part in self.parts}
        total = functools.reduce(operator.add, (part.weight * by_part[part.name] for part in self.parts))
        return total, by_part
