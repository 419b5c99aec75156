"""Completions of prompts by one compiled function, batch by batch."""

import dataclasses
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
from jaxtune.generation.sampling import Completions, from_settings, pad_prompts, sample
from jaxtune.generation.text_metrics import exact
from jaxtune.parallel import place_all
from jaxtune.pretrained.load import ModelBundle


class Generator:
    """Completes prompts as a recipe's `generate` says.

    Args:
      settings: the recipe's `generate` subtree.
      mesh: where the batches go.
      bundle: model and tokenizer; its parameters are not used.
      batch_size: rows of a batch, a multiple of the mesh's `data` times `fsdp`.
      seed: of what is drawn.
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
        self.pad_id, root, model = sampling.pad_id, jax.random.key(seed), bundle.model

        def run(params: Any, batch: Mapping[str, jax.Array]) -> Completions:
            prompts = (batch['prompts'], batch['lengths'])
            if beams > 1:
                return beam_search(model, sampling, params, *prompts, beams, settings.length_penalty)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch['number'])
            return sample(model, sampling, params, *prompts, keys)

        self._run = jax.jit(run, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, params: Any, prompts: Sequence[Prompt], first: int = 0) -> list[tuple[str, int]]:
        """Texts and their numbers of tokens, of at most a batch of prompts; `first` is the number of the first one."""
        size = self.batch_size
        filled = [*prompts, *[prompts[-1]] * (size - len(prompts))]
        ids, lengths = pad_prompts([prompt.ids for prompt in filled], self.pad_id)
        arrays = {'prompts': ids, 'lengths': lengths, 'number': np.arange(first, first + size, dtype=np.int32)}
        completions = jax.tree.map(np.asarray, self._run(params, place_all(arrays, self.mesh)))
        texts = []
        for row, prompt in enumerate(prompts):
            new = completions.tokens[row, : completions.lengths[row]].tolist()
            texts.append((decode_continuation(self.tokenizer, [] if self.answers else prompt.ids, new), len(new)))
        return texts


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
