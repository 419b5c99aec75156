"""`samples.jsonl`: completions of a model, by step."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxtune.common.io import write_text

NAME = 'samples.jsonl'


def read_samples(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The samples of a workdir, without a torn last line; [] without a file."""
    samples = []
    try:
        # Not by `splitlines`: an answer may hold separators that end a line for Unicode, but not for JSON.
        lines = (workdir / NAME).read_text('utf-8', errors='replace').split('\n')
    except OSError:
        return samples
    for line in lines:
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        if isinstance(sample, dict):
            samples.append(sample)
    return samples


def add_samples(workdir: pathlib.Path, step: int, samples: Iterable[dict[str, Any]]) -> None:
    """Adds the samples of a step, in place of those of this and later steps."""
    earlier = [sample for sample in read_samples(workdir) if sample['step'] < step]
    lines = (json.dumps(sample, ensure_ascii=False) + '\n' for sample in [*earlier, *samples])
    write_text(workdir / NAME, ''.join(lines))
