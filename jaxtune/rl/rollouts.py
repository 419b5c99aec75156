"""Rollouts: answers that a policy writes, as texts to be scored and as rows to learn from."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.common.settings import Settings
from jaxtune.data.templates import Template
from jaxtune.generation import stop_texts
from jaxtune.generation.generator import decode_continuation, end_of_answer
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions, from_settings
from jaxtune.generation.slot_sampler import SlotSampler
from jaxtune.models import value_head
from jaxtune.pretrained.load import ModelBundle
from jaxtune.rl.environments import RunningEnvironment
from jaxtune.rl.exchanges import Exchange, Exchanges
from jaxtune.rl.exchanges import arrays as exchange_arrays
from jaxtune.rl.replies import Part, ReplyEncoder
from jaxtune.weights import eval_mode
from jaxtune.weights.tree import combine

# The key of a turn is that of another answer to the prompt, beyond any that a group has.
_TURN_BITS = 20


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Answers to prompts.

    Attributes:
      prompts: what was answered, one for each answer.
      texts: the answers.
      tokens: `[rows, length]` int32, prompt and answer, padded right.
      start: `[rows]` int32, where the answer begins.
      end: `[rows]` int32, where it ends.
      ended: `[rows]` bool, whether it came to its end before `generate.max_new_tokens`.
      logprobs: `[rows, max_new_tokens]` float32, the sampler's, at the temperature, of the policy's own tokens one
        after the other; 0 after the end.
      inserted: `[rows, length]` bool, which tokens an environment wrote; None = none.
      rewards: `[rows]` float32, the environment's; None = none.
      turns: `[rows]` int32, of the policy; None = one each.
      parts: who wrote what of each answer; () = all is the policy's.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    ended: np.ndarray
    logprobs: np.ndarray
    inserted: np.ndarray | None = None
    rewards: np.ndarray | None = None
    turns: np.ndarray | None = None
    parts: Sequence[Sequence[Part]] = ()

    @property
    def own(self) -> np.ndarray:
        """Which tokens the policy wrote, `[rows, length]` bool."""
        places = np.arange(self.tokens.shape[1])
        answer = (places >= self.start[:, None]) & (places < self.end[:, None])
        return answer if self.inserted is None else answer & ~self.inserted

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens the policy wrote, `[rows]` int."""
        return self.end - self.start if self.inserted is None else self.own.sum(axis=1)


class Sampler:
    """Answers prompts as a recipe's `generate` says, in `generate.batch_size` slots; a prompt's group reads it once.

    Args:
      settings: the recipe's `generate` subtree.
      mesh: where the batches go.
      bundle: model and tokenizer; its parameters are not used.
      prompts: all that it will be asked, none with more tokens than `seq_len` less `generate.max_new_tokens`.
      seq_len: tokens of prompt and answer at most.
      seed: of what is drawn.
      environment: answers the policy's turns, with how many they are at most and the template of conversations, where
        some prompts are any; None: an answer is one turn.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: Mesh,
        bundle: ModelBundle,
        prompts: Sequence[Prompt],
        seq_len: int,
        seed: int,
        environment: tuple[RunningEnvironment, int, Template | None] | None = None,
    ) -> None:
        self.seq_len, self.mesh, self.tokenizer = seq_len, mesh, bundle.tokenizer
        self.batch_size, self.longest = settings.batch_size, max(len(prompt.ids) for prompt in prompts)
        stops = (*bundle.end_ids, *end_of_answer(bundle.tokenizer))
        sampling = from_settings(settings, bundle.tokenizer, stops, bundle.model.config.vocab_size)
        self.sampling = sampling = dataclasses.replace(sampling, tempered=True)

        def policy(trainable: Any, frozen: Any) -> Any:
            return eval_mode(value_head.policy(combine(trainable, frozen)))

        rows, watch, self._exchanges = bundle.model.config.vocab_size, None, None
        if environment is not None:
            running, turns, template = environment
            encode = ReplyEncoder(bundle.tokenizer, template, running.role, rows)
            limit = sampling.max_new_tokens
            self._exchanges = Exchanges(running, encode, bundle.tokenizer, sampling.stop_ids, limit, turns)
            watch = stop_texts.automaton(bundle.tokenizer, running.stops, rows) if running.stops else None
        root = jax.random.key(seed)
        self._sample = SlotSampler(bundle.model, sampling, mesh, self.batch_size, root, policy, watch=watch)
        self.usage = self._sample.usage

    def __call__(self, trainable: Any, frozen: Any, prompts: Sequence[Prompt], first: int) -> Rollouts:
        """Answers to prompts; equal ones that follow each other are a group.

        The randomness of each answer is a function of the seed, of its group's number (`first` and the number of
        answers before the group), and of its own number in the group; in an exchange, of the turn's, too.
        """
        groups = [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.ids)]
        counts = [len(group) for group in groups]
        numbers = [first + before for before in itertools.accumulate(counts[:-1], initial=0)]
        ids, trees = [group[0].ids for group in groups], [trainable, frozen]
        if self._exchanges is None:
            return self._rollouts(prompts, self._sample(trees, ids, counts, numbers, self.longest))
        limit = self.sampling.max_new_tokens
        of_answers = [(number, own) for number, count in zip(numbers, counts, strict=True) for own in range(count)]

        def sample(live: Sequence[tuple[int, Exchange]], turn: int) -> Completions:
            if not turn:  # every answer, with a group's prompt read once
                return self._sample(trees, ids, counts, numbers, self.longest)
            return self._sample(
                trees,
                [one.whole for _, one in live],
                numbers=[of_answers[row][0] for row, _ in live],
                width=self.longest + limit,
                firsts=[of_answers[row][1] + (turn << _TURN_BITS) for row, _ in live],
                limits=[limit - len(one.ids) for _, one in live],
            )

        exchanges = self._exchanges(prompts, sample)
        texts = [decode_continuation(self.tokenizer, one.prompt.ids, one.ids) for one in exchanges]
        fields = exchange_arrays(exchanges, self.seq_len, limit, self.sampling.pad_id)
        return Rollouts(prompts, texts, parts=[one.parts for one in exchanges], **fields)

    def _rollouts(self, prompts: Sequence[Prompt], completions: Completions) -> Rollouts:
        new, counts = completions.tokens, completions.lengths
        tokens = np.full((len(prompts), self.seq_len), self.sampling.pad_id, np.int32)
        texts, starts = [], np.asarray([len(prompt.ids) for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            answer = new[row, : counts[row]]
            tokens[row, : starts[row]] = prompt.ids
            tokens[row, starts[row] : starts[row] + counts[row]] = answer
            texts.append(decode_continuation(self.tokenizer, prompt.ids, answer.tolist()))
        ended = np.isin(new[np.arange(len(new)), counts - 1], self.sampling.stop_ids)
        return Rollouts(prompts, texts, tokens, starts, starts + counts, ended, np.asarray(completions.logprobs))
