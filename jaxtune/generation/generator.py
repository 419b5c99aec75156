"""Completions of prompts by one compiled function, batch by batch."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune.data.spans import end_of_turn
from jaxtune.data.templates import open_template
from jaxtune.generation.beam import beam_search
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import from_config, pad_prompts, sample
from jaxtune.generation.text_metrics import exact
from jaxtune.parallel import place_all
from jaxtune.pretrained.load import Assembly


class Completer:
    """Completes prompts as a recipe's `generate` says.

    Args:
      config: the recipe.
      mesh: where the batches go.
      parts: model and tokenizer; its parameters are not used.
      batch_size: rows of a batch, a multiple of the mesh's `data` times `fsdp`.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, parts: Assembly, batch_size: int):
        self.mesh, self.batch_size, self.tokenizer = mesh, batch_size, parts.tokenizer
        self.answers = parts.model.kind == 'encdec'  # what it writes does not go on from what it read
        settings = config.generate
        sampling = from_config(settings, parts.tokenizer, (*parts.end_ids, *end_of_answer(parts.tokenizer)))
        self.pad_id, root = sampling.pad_id, jax.random.key(config.seed)

        def run(params, batch):
            prompts = (batch['prompts'], batch['lengths'])
            if settings.beams > 1:
                return beam_search(parts.model, sampling, params, *prompts, settings.beams, settings.length_penalty)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch['number'])
            return sample(parts.model, sampling, params, *prompts, keys)

        self._run = jax.jit(run, out_shardings=NamedSharding(mesh, P()))

    def __call__(self, params: Any, prompts: Sequence[Prompt], first: int = 0) -> list[tuple[str, int]]:
        """Texts and their numbers of tokens, of at most a batch of prompts; `first` is the number of the first one."""
        size = self.batch_size
        filled = [*prompts, *[prompts[-1]] * (size - len(prompts))]
        ids, lengths = pad_prompts([prompt.ids for prompt in filled], self.pad_id)
        arrays = {'prompts': ids, 'lengths': lengths, 'number': np.arange(first, first + size, dtype=np.int32)}
        made = jax.tree.map(np.asarray, self._run(params, place_all(arrays, self.mesh)))
        found = []
        for row, prompt in enumerate(prompts):
            new = made.tokens[row, : made.lengths[row]].tolist()
            found.append((decode_continuation(self.tokenizer, [] if self.answers else prompt.ids, new), len(new)))
        return found


def sample_record(prompt: Prompt, completion: str, step: int) -> dict[str, Any]:
    """A line of `samples.jsonl`; its score tells whether the completion is what the data expected."""
    line = {'prompt': prompt.text, 'completion': completion, 'score': None, 'step': step}
    if prompt.reference is not None:
        line |= {'reference': prompt.reference, 'score': exact(completion, prompt.reference)}
    return line


def end_of_answer(tokenizer) -> list[int]:
    """What ends an answer by the chat template, where the tokenizer has one."""
    if not tokenizer.chat_template:
        return []
    end = end_of_turn(open_template('auto', tokenizer), tokenizer)
    return [] if end is None else [end]


def decode_continuation(tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt's.

    Decoded by themselves they could lose what depends on the text before: a leading space, half a character.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
