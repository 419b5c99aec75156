"""What a model makes of a few held-out prompts before it is trained and after, for `samples.jsonl` and the report."""

import copy
import pathlib
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune.common import console
from jaxtune.errors import UserError
from jaxtune.generation.generator import Completer, sample_record
from jaxtune.generation.prompts import read_prompts
from jaxtune.metrics.samples import add_samples
from jaxtune.pretrained.load import Assembly

# Objectives whose models write, and how many tokens of a text they go on from (0 = the whole prompt).
_PROMPT_TOKENS = {'causal_lm': 32, 'sft': 0, 'seq2seq': 0}


def check(config: ConfigDict) -> None:
    """Refuses `eval.samples` where the objective's model does not write.

    Raises:
      UserError: so it is.
    """
    if config.eval.samples and config.objective not in _PROMPT_TOKENS:
        raise UserError(
            f'eval.samples={config.eval.samples}: expected an objective of {", ".join(_PROMPT_TOKENS)}, or 0'
        )


def wanted(config: ConfigDict) -> bool:
    """Whether samples are to be written: where nothing is held out there is nothing to answer."""
    return bool(config.eval.samples and config.data.eval)


class Witness:
    """Greedy completions of the first `eval.samples` prompts of `data.eval`.

    Args:
      config: the recipe.
      workdir: of the run.
      mesh: the mesh.
      parts: the run's model and tokenizer.

    Where no prompt leaves room for a completion, it says so and writes nothing.

    Raises:
      UserError: the prompts are wrong.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, parts: Assembly):
        count, config = config.eval.samples, copy.deepcopy(config)
        config.generate.temperature, config.generate.beams = 0.0, 1
        config.generate.prompts = 8 * count  # of which some may be too long
        config.generate.prompt_tokens = _PROMPT_TOKENS[config.objective]
        if config.objective == 'seq2seq':
            config.data.format = 'pair'
        self.prompts = read_prompts(config, parts, config.objective == 'sft', fitting=True, needed=False)[:count]
        if not self.prompts:
            console.note(
                f'eval.samples={count}: none is written: no prompt of data.eval leaves room for '
                f'generate.max_new_tokens={config.generate.max_new_tokens}'
            )
            return
        rows = mesh.shape['data'] * mesh.shape['fsdp']
        self.complete = Completer(config, mesh, parts, -(-len(self.prompts) // rows) * rows)
        self.workdir = workdir

    def write(self, params: Any, step: int) -> None:
        """Writes what the model answers after an update; what stands there of later ones goes."""
        if not self.prompts:
            return
        made = self.complete(params, self.prompts)
        if not console.is_primary():
            return
        pairs = zip(self.prompts, made, strict=True)
        add_samples(self.workdir, step, [sample_record(prompt, completion, step) for prompt, (completion, _) in pairs])
