"""Rollouts: answers that a policy writes, as texts to be scored and as rows to learn from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common.settings import Settings
from jaxtune.generation.generator import decode_continuation, end_of_answer
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions, from_settings, pad_prompts, sample
from jaxtune.models import value_head
from jaxtune.parallel import compiler_options, place_all
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
        self.sampling = sampling = from_settings(settings, bundle.tokenizer, stops, bundle.model.config.vocab_size)
        root, model = jax.random.key(seed), bundle.model

        def run(trainable: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> Completions:
            params = eval_mode(value_head.policy(combine(trainable, frozen)))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch['number'])
            return sample(model, sampling, params, batch['prompts'], batch['lengths'], keys)

        self._run = jax.jit(run, out_shardings=NamedSharding(mesh, P()), compiler_options=compiler_options())

    def __call__(self, trainable: Any, frozen: Any, prompts: Sequence[Prompt], first: int) -> Rollouts:
        """Answers to prompts; the randomness of each is a function of the seed and its number, `first` and on."""
        size, count = self.batch_size, len(prompts)
        filled = [*prompts, *[prompts[-1]] * (-count % size)]
        ids, lengths = self._padded(filled)
        numbers = np.arange(first, first + len(filled), dtype=np.int32)
        arrays = {'prompts': ids, 'lengths': lengths, 'number': numbers}
        parts = []
        for low in range(0, len(filled), size):
            part = {name: array[low : low + size] for name, array in arrays.items()}
            parts.append(self._run(trainable, frozen, place_all(part, self.mesh)))
        whole = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs])[:count], *parts)
        return self._rollouts(prompts, whole)

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of prompts, all as wide as the longest there is."""
        ids, lengths = pad_prompts([prompt.ids for prompt in prompts], self.sampling.pad_id)
        width = -(-self.longest // 32) * 32
        return np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=self.sampling.pad_id), lengths

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
