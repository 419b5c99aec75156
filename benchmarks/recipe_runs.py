"""Running a recipe from a benchmark."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def run_recipe(recipe: str, workdir: pathlib.Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a recipe of `configs/` in a process of its own; returns the metrics of its `result.json`.

    A run that fails has said why: this process ends with its exit status.
    """
    flags = [f'--config.{name}={value}' for name, value in keys.items()]
    words = [
        sys.executable,
        '-m',
        'jaxtune.main',
        '--config',
        str(_CONFIGS / recipe),
        '--workdir',
        str(workdir),
        *flags,
    ]
    if status := subprocess.run(words, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(status)
    return json.loads((workdir / 'result.json').read_text())['metrics']
