"""Exchanges: a policy and an environment write in turn, until the environment is done or no room is left.

Each round samples one turn of every exchange that is open, all at once. What the environment adds is encoded once, and
what the policy wrote stays the tokens that it drew. The randomness of a turn is a function of the seed, of the prompt's
number, of the answer's own, and of the number of rounds before it in its own exchange.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.errors import StepError
from jaxtune.generation import stop_texts
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions
from jaxtune.rl.environment_process import Reply
from jaxtune.rl.environments import RunningEnvironment
from jaxtune.rl.replies import ENVIRONMENT, MODEL, Part, ReplyEncoder


@dataclasses.dataclass
class Exchange:
    """What was written after a prompt.

    Attributes:
      prompt: the prompt.
      ids: the tokens after it.
      own: which of them the policy wrote.
      logprobs: the sampler's, of those alone.
      parts: who wrote what, in order.
      begun: where the policy's turn begins in `ids`.
      turns: turns of the policy that came to their end.
      reward: the environment's so far.
      open: it goes on.
      ended: it came to its end, and was not cut.
    """

    prompt: Prompt
    ids: list[int] = dataclasses.field(default_factory=list)
    own: list[bool] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    parts: list[Part] = dataclasses.field(default_factory=list)
    begun: int = 0
    turns: int = 0
    reward: float = 0.0
    open: bool = True
    ended: bool = False

    @property
    def whole(self) -> list[int]:
        """Prompt and what follows it."""
        return [*self.prompt.ids, *self.ids]

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Adds tokens; the policy's own with their log-probabilities."""
        self.ids += ids
        self.own += [logprobs is not None] * len(ids)
        self.logprobs += logprobs or ()


# `(exchanges that are open, the number of the round) -> a turn of each`
SampleTurns = Callable[[Sequence[tuple[int, Exchange]], int], Completions]


class Exchanges:
    """Lets a policy and an environment write in turn.

    Args:
      environment: what answers.
      encode: its replies.
      tokenizer: of the policy.
      stop_ids: tokens that end a turn.
      limit: tokens after a prompt at most, whoever wrote them.
      max_turns: turns of the policy at most.
    """

    def __init__(
        self,
        environment: RunningEnvironment,
        encode: ReplyEncoder,
        tokenizer: Any,
        stop_ids: Sequence[int],
        limit: int,
        max_turns: int,
    ) -> None:
        self.environment, self.encode, self.tokenizer = environment, encode, tokenizer
        self.stop_ids, self.limit, self.max_turns = frozenset(stop_ids), limit, max_turns

    def __call__(self, prompts: Sequence[Prompt], sample: SampleTurns) -> list[Exchange]:
        """One exchange about each prompt.

        Raises:
          StepError: the environment fails, or its reply cannot be encoded.
        """
        self.environment.reset(prompts)
        exchanges = [Exchange(prompt) for prompt in prompts]
        rounds = 0
        while live := [(number, one) for number, one in enumerate(exchanges) if one.open]:
            turns = sample(live, rounds)
            ended = []
            for row, (number, one) in enumerate(live):
                length = int(turns.lengths[row])
                if self._write(one, turns.tokens[row, :length].tolist(), turns.logprobs[row, :length].tolist()):
                    ended.append((number, one))
            if ended:
                replies = self.environment.step([number for number, _ in ended], [self._turn(one) for _, one in ended])
                for (_, one), reply in zip(ended, replies, strict=True):
                    self._reply(one, reply)
            rounds += 1
        return exchanges

    def _write(self, one: Exchange, ids: list[int], logprobs: list[float]) -> bool:
        """Adds what the policy drew, up to a stop; returns whether its turn has ended."""
        before = one.ids[one.begun :]
        stopped = stop_texts.reached(self.tokenizer, [*before, *ids], self.environment.stops) - len(before)
        if stopped > 0:
            ids, logprobs = ids[:stopped], logprobs[:stopped]
        one.add(ids, logprobs)
        over = stopped > 0 or one.ids[-1] in self.stop_ids
        one.open = len(one.ids) < self.limit
        if over:
            one.turns += 1
        if over or not one.open:
            one.parts.append(Part(MODEL, self._turn(one), one.ids[-1] in self.stop_ids))
        return over

    def _turn(self, one: Exchange) -> str:
        """The text of the turn that the policy wrote last, without the token that ends it."""
        ids = one.ids[one.begun :]
        return self.tokenizer.decode(ids[:-1] if ids[-1] in self.stop_ids else ids, skip_special_tokens=False)

    def _reply(self, one: Exchange, reply: Reply) -> None:
        """Adds a reply where the exchange goes on."""
        one.reward += reply.reward
        whole_turn = one.ids[-1] in self.stop_ids
        if reply.done or (reply.text is None and whole_turn):
            one.open, one.ended = False, True
            return
        added = self._encoded(one, reply.text, whole_turn) if reply.text is not None else []
        if one.turns >= self.max_turns or len(one.ids) + len(added) >= self.limit:
            one.open = False
            return
        if reply.text is not None:
            one.add(added)
            one.parts.append(Part(ENVIRONMENT, reply.text, whole_turn))
        one.begun = len(one.ids)

    def _encoded(self, one: Exchange, text: str, whole_turn: bool) -> list[int]:
        try:
            if whole_turn and not isinstance(one.prompt.text, str):
                return self.encode.turn(one.prompt.text, one.parts, text, one.ids[-1])
            return self.encode.text(text)
        except ValueError as error:
            raise StepError(f'rl.environment={self.environment.name}: {error}') from None


def arrays(exchanges: Sequence[Exchange], seq_len: int, limit: int, pad_id: int) -> dict[str, np.ndarray]:
    """Exchanges as the fields of `Rollouts` that are arrays."""
    count = len(exchanges)
    tokens = np.full((count, seq_len), pad_id, np.int32)
    inserted = np.zeros((count, seq_len), bool)
    logprobs = np.zeros((count, limit), np.float32)
    start = np.asarray([len(one.prompt.ids) for one in exchanges], np.int32)
    for row, one in enumerate(exchanges):
        whole = one.whole
        tokens[row, : len(whole)] = whole
        inserted[row, start[row] : len(whole)] = ~np.asarray(one.own, bool)
        logprobs[row, : len(one.logprobs)] = one.logprobs
    return {
        'tokens': tokens,
        'start': start,
        'end': start + np.asarray([len(one.ids) for one in exchanges], np.int32),
        'ended': np.asarray([one.ended for one in exchanges]),
        'logprobs': logprobs,
        'inserted': inserted,
        'rewards': np.asarray([one.reward for one in exchanges], np.float32),
        'turns': np.asarray([one.turns for one in exchanges], np.int32),
    }
