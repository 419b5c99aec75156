"""Completions of prompts as texts."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common.settings import Settings
from jaxtune.data.chat_encoder import end_of_turn
from jaxtune.data.templates import open_template
from jaxtune.generation.beam import beam_search
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions, from_settings, pad_prompts
from jaxtune.generation.slot_sampler import SlotSampler, Usage
from jaxtune.generation.text_metrics import exact
from jaxtune.parallel import place_all
from jaxtune.pretrained.load import ModelBundle


class Generator:
    """Completes prompts as a recipe's `generate` says.

    Args:
      settings: the recipe's `generate` subtree.
      mesh: where it runs.
      bundle: model and tokenizer; its parameters are not used.
      batch_size: completions that are written at a time, a multiple of the mesh's `data` times `fsdp`.
      seed: of what is drawn; a completion is a function of it, of its prompt's number, and of its own among that
        prompt's.
      greedy: takes the likeliest token always, whatever the settings say.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: Mesh,
        bundle: ModelBundle,
        batch_size: int,
        seed: int = 0,
        greedy: bool = False,
    ) -> None:
        self.mesh, self.batch_size, self.tokenizer = mesh, batch_size, bundle.tokenizer
        self.answers = bundle.model.kind == 'encdec'  # what it writes does not go on from what it read
        stops = (*bundle.end_ids, *end_of_answer(bundle.tokenizer))
        sampling = from_settings(settings, bundle.tokenizer, stops, bundle.model.config.vocab_size)
        sampling = dataclasses.replace(sampling, temperature=0.0) if greedy else sampling
        beams = 1 if greedy else settings.beams
        self.pad_id, self.usage, model = sampling.pad_id, Usage(batch_size), bundle.model
        self._sampler = None
        if beams == 1:
            self._sampler = SlotSampler(model, sampling, mesh, batch_size, jax.random.key(seed))
            self.usage = self._sampler.usage

        def search(params: Any, batch: Mapping[str, jax.Array]) -> Completions:
            prompts = (batch['prompts'], batch['lengths'])
            return beam_search(model, sampling, params, *prompts, beams, settings.length_penalty)

        self._search = jax.jit(search, out_shardings=NamedSharding(mesh, P()))

    def __call__(
        self, params: Any, prompts: Sequence[Prompt], first: int = 0, samples: int = 1
    ) -> list[tuple[str, int]]:
        """Texts and their numbers of tokens, those of one prompt together.

        Args:
          params: the model's parameters.
          prompts: any number of them.
          first: the number of the first one.
          samples: completions of each; 1 of beam search.
        """
        if self._sampler:
            ids = [prompt.ids for prompt in prompts]
            numbers = range(first, first + len(prompts))
            done = self._sampler([params], ids, [samples] * len(prompts), numbers)
        else:
            size = self.batch_size
            parts = [self._beams(params, prompts[low : low + size]) for low in range(0, len(prompts), size)]
            done = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        texts = []
        for row, (tokens, length) in enumerate(zip(done.tokens, done.lengths, strict=True)):
            before = [] if self.answers else prompts[row // samples].ids
            texts.append((decode_continuation(self.tokenizer, before, tokens[:length].tolist()), int(length)))
        return texts

    def _beams(self, params: Any, prompts: Sequence[Prompt]) -> Completions:
        """Completions of at most a batch of prompts."""
        started, filled = time.perf_counter(), [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]
        ids, lengths = pad_prompts([prompt.ids for prompt in filled], self.pad_id)
        batch = place_all({'prompts': ids, 'lengths': lengths}, self.mesh)
        done = jax.tree.map(lambda x: np.asarray(x)[: len(prompts)], self._search(params, batch))
        self.usage.tokens += int(done.lengths.sum())
        self.usage.seconds += time.perf_counter() - started
        return done


def sample_record(prompt: Prompt, completion: str, step: int) -> dict[str, Any]:
    """A line of `samples.jsonl`; its score tells whether the completion is what the data expected."""
    line = {'prompt': prompt.text, 'completion': completion, 'score': None, 'step': step}
    if prompt.reference is not None:
        line |= {'reference': prompt.reference, 'score': exact(completion, prompt.reference)}
    return line


def end_of_answer(tokenizer: Any) -> list[int]:
    """What ends an answer by the chat template, where the tokenizer has one."""
    if not tokenizer.chat_template:
        return []
    end = end_of_turn(open_template('auto', tokenizer), tokenizer)
    return [] if end is None else [end]


def decode_continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt's.

    Decoded by themselves they could lose what depends on the text before: a leading space, half a character.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
