"""`metrics.jsonl`, TensorBoard events and Weights & Biases: metrics once per step, also after a resume."""

import json
import math
import pathlib
import resource
import secrets
import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import jax

from jaxtune.common import console
from jaxtune.common.io import write_text
from jaxtune.errors import UserError

NAME = 'metrics.jsonl'


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without a torn last line; [] without a file."""
    rows = []
    try:
        text = path.read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get('step'), int):
            rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + '\n'


def _number(value: Any) -> int | float | None:
    """A Python number at full precision; None for NaN and infinities, which JSON does not have."""
    if isinstance(value, int):  # bool too
        return value
    value = float(value)
    return value if math.isfinite(value) else None


class MetricsWriter:
    """Appends metrics to a workdir.

    Args:
      workdir: an existing folder.
      resume_step: lines of later steps, and a torn last line, are cut off first, so that a killed and resumed run has
        each step once; None starts an empty file.
      wandb: log them to Weights & Biases too.

    Raises:
      UserError: `wandb` is set and the package is not installed.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int | None = None, wandb: bool = False) -> None:
        self._latest: dict[str, int | float | None] = {}
        self._file: TextIO | None = None
        self._events: Any = None
        self._wandb: Any = None
        if not console.is_primary():
            return
        if wandb:
            self._wandb = _open_wandb(workdir, resume_step)
        path = workdir / NAME
        rows = [] if resume_step is None else [row for row in read_metrics(path) if row['step'] <= resume_step]
        write_text(path, ''.join(map(_line, rows)))
        for row in rows:
            self._remember(row)
        self._file = path.open('a', encoding='utf-8')

        from tensorboardX import SummaryWriter  # slow to import

        folder = workdir / 'tensorboard'
        if resume_step is None:
            shutil.rmtree(folder, ignore_errors=True)
        purge = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def _remember(self, row: Mapping[str, Any]) -> None:
        self._latest.update((name, value) for name, value in row.items() if name.startswith('train/'))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, flushed to the operating system.

        Args:
          step: updates done.
          metrics: names such as `train/loss` -> a number or a scalar array; NaN and infinities become null.
        """
        row = {name: _number(value) for name, value in metrics.items()}
        self._remember(row)
        if self._file is None:
            return
        self._file.write(_line({'step': int(step), **row}))
        self._file.flush()
        finite = {name: value for name, value in row.items() if value is not None}
        for name, value in finite.items():
            self._events.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log({'step': int(step), **finite})

    def latest(self) -> dict[str, int | float | None]:
        """The newest value of each `train/` metric."""
        return dict(self._latest)

    def close(self) -> None:
        """Closes the files; a second time does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._events.close()
        self._file = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _open_wandb(workdir: pathlib.Path, resume_step: int | None) -> Any:
    """The Weights & Biases run; a resumed workdir continues its own."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]: an extra
    except ImportError:
        raise UserError(
            'log.wandb=True: the package wandb is not installed; expected it (pip install wandb) or log.wandb=False'
        ) from None
    path = workdir / 'wandb_run'
    identity = path.read_text(encoding='utf-8').strip() if resume_step is not None and path.is_file() else ''
    identity = identity or secrets.token_hex(4)
    write_text(path, identity + '\n')
    recipe = workdir / 'config.json'
    run = wandb.init(
        project='jaxtune',
        name='/'.join(workdir.absolute().parts[-2:]),
        id=identity,
        resume='allow',
        dir=str(workdir),
        config=json.loads(recipe.read_text(encoding='utf-8')) if recipe.is_file() else None,
    )
    # Steps that are repeated after a kill go backwards, which its own counter rejects.
    run.define_metric('*', step_metric='step')
    return run


def peak_memory_bytes() -> int:
    """Peak memory of a local device so far, in bytes; on a CPU, of this process."""
    peaks = [(device.memory_stats() or {}).get('peak_bytes_in_use', 0) for device in jax.local_devices()]
    if any(peaks):
        return int(max(peaks))
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
