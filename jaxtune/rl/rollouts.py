"""Rollouts: answers that a policy writes, as texts to be scored and as rows to learn from."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.common.settings import Settings
from jaxtune.generation.generator import decode_continuation, end_of_answer
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions, from_settings
from jaxtune.generation.slot_sampler import SlotSampler
from jaxtune.models import value_head
from jaxtune.pretrained.load import ModelBundle
from jaxtune.weights import eval_mode
from jaxtune.weights.tree import combine


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
      logprobs: `[rows, max_new_tokens]` float32, the sampler's, at the temperature; 0 after the end.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    ended: np.ndarray
    logprobs: np.ndarray


class Sampler:
    """Answers prompts as a recipe's `generate` says, in `generate.batch_size` slots; a prompt's group reads it once.

    Args:
      settings: the recipe's `generate` subtree.
      mesh: where the batches go.
      bundle: model and tokenizer; its parameters are not used.
      prompts: all that it will be asked, none with more tokens than `seq_len` less `generate.max_new_tokens`.
      seq_len: tokens of prompt and answer at most.
      seed: of what is drawn.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: Mesh,
        bundle: ModelBundle,
        prompts: Sequence[Prompt],
        seq_len: int,
        seed: int,
    ) -> None:
        self.seq_len, self.mesh, self.tokenizer = seq_len, mesh, bundle.tokenizer
        self.batch_size, self.longest = settings.batch_size, max(len(prompt.ids) for prompt in prompts)
        stops = (*bundle.end_ids, *end_of_answer(bundle.tokenizer))
        sampling = from_settings(settings, bundle.tokenizer, stops, bundle.model.config.vocab_size)
        self.sampling = sampling = dataclasses.replace(sampling, tempered=True)

        def policy(trainable: Any, frozen: Any) -> Any:
            return eval_mode(value_head.policy(combine(trainable, frozen)))

        self._sample = SlotSampler(bundle.model, sampling, mesh, self.batch_size, jax.random.key(seed), policy)
        self.usage = self._sample.usage

    def __call__(self, trainable: Any, frozen: Any, prompts: Sequence[Prompt], first: int) -> Rollouts:
        """Answers to prompts; equal ones that follow each other are a group.

        The randomness of each answer is a function of the seed, of its group's number (`first` and the number of
        answers before the group), and of its own number in the group.
        """
        groups = [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.ids)]
        counts = [len(group) for group in groups]
        numbers = [first + before for before in itertools.accumulate(counts[:-1], initial=0)]
        ids = [group[0].ids for group in groups]
        return self._rollouts(prompts, self._sample([trainable, frozen], ids, counts, numbers, self.longest))

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
