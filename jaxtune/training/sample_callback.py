"""What a model makes of a few held-out prompts before it is trained and after, for `samples.jsonl` and the report."""

import pathlib
from collections.abc import Sequence
from typing import Any

from jaxtune.common import console
from jaxtune.generation.generator import Generator, sample_record
from jaxtune.generation.prompts import Prompt
from jaxtune.metrics.samples import add_samples


class SampleCallback:
    """Completions of some held-out prompts.

    Args:
      generator: that completes all of them in one batch.
      prompts: what is completed.
      workdir: of the run.
    """

    def __init__(self, generator: Generator, prompts: Sequence[Prompt], workdir: pathlib.Path) -> None:
        self.generator, self.prompts, self.workdir = generator, prompts, workdir

    def write(self, params: Any, step: int) -> None:
        """Writes what the model answers after an update; what stands there of later ones goes."""
        completions = self.generator(params, self.prompts)
        if not console.is_primary():
            return
        pairs = zip(self.prompts, completions, strict=True)
        add_samples(self.workdir, step, [sample_record(prompt, text, step) for prompt, (text, _) in pairs])
