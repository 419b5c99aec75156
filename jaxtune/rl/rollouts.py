"""Rollouts: answers that a policy writes, as texts to be scored and as rows to learn from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune.generation.generator import decode_continuation, end_of_answer
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions, from_config, pad_prompts, sample
from jaxtune.models import value_head
from jaxtune.parallel import compiler_options, place_all
from jaxtune.pretrained.load import Assembly
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
      logprobs: `[rows, max_new_tokens]` float32, the sampler's.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    ended: np.ndarray
    logprobs: np.ndarray


class Sampler:
    """Answers prompts as a recipe's `generate` says, `generate.batch_size` at a time; one compile.

    Args:
      config: the recipe.
      mesh: where the batches go.
      parts: model and tokenizer; its parameters are not used.
      prompts: all that it will be asked, none with more tokens than `data.seq_len` less `generate.max_new_tokens`.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, parts: Assembly, prompts: Sequence[Prompt]):
        self.config, self.mesh, self.tokenizer = config, mesh, parts.tokenizer
        self.batch_size, self.longest = config.generate.batch_size, max(len(prompt.ids) for prompt in prompts)
        stops = (*parts.end_ids, *end_of_answer(parts.tokenizer))
        self.sampling = sampling = from_config(config.generate, parts.tokenizer, stops)
        root = jax.random.key(config.seed)

        def run(trainable, frozen, batch):
            params = eval_mode(value_head.policy(combine(trainable, frozen)))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch['number'])
            return sample(parts.model, sampling, params, batch['prompts'], batch['lengths'], keys)

        self._run = jax.jit(run, out_shardings=NamedSharding(mesh, P()), compiler_options=compiler_options())

    def __call__(self, trainable: Any, frozen: Any, prompts: Sequence[Prompt], first: int) -> Rollouts:
        """Answers to prompts; the randomness of each is a function of the seed and its number, `first` and on."""
        size, count = self.batch_size, len(prompts)
        filled = [*prompts, *[prompts[-1]] * (-count % size)]
        ids, lengths = self._padded(filled)
        numbers = np.arange(first, first + len(filled), dtype=np.int32)
        arrays = {'prompts': ids, 'lengths': lengths, 'number': numbers}
        made = []
        for low in range(0, len(filled), size):
            part = {name: array[low : low + size] for name, array in arrays.items()}
            made.append(self._run(trainable, frozen, place_all(part, self.mesh)))
        whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(x) for x in parts])[:count], *made)
        return self._rollouts(prompts, whole)

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of prompts, all as wide as the longest there is."""
        ids, lengths = pad_prompts([prompt.ids for prompt in prompts], self.sampling.pad_id)
        width = -(-self.longest // 32) * 32
        return np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=self.sampling.pad_id), lengths

    def _rollouts(self, prompts: Sequence[Prompt], made: Completions) -> Rollouts:
        new, counts = made.tokens, made.lengths
        tokens = np.full((len(prompts), self.config.data.seq_len), self.sampling.pad_id, np.int32)
        texts, starts = [], np.asarray([len(prompt.ids) for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            answer = new[row, : counts[row]]
            tokens[row, : starts[row]] = prompt.ids
            tokens[row, starts[row] : starts[row] + counts[row]] = answer
            texts.append(decode_continuation(self.tokenizer, prompt.ids, answer.tolist()))
        ended = np.isin(new[np.arange(len(new)), counts - 1], self.sampling.stop_ids)
        return Rollouts(prompts, texts, tokens, starts, starts + counts, ended, made.logprobs)
