"""What a run is: `run.json`, which the report is made of."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.io import read_mapping, write_json
from jaxtune.data.mixture import Mixture
from jaxtune.metrics.writer import NAME as METRICS
from jaxtune.models import Model
from jaxtune.parallel import copied_bytes, hardware
from jaxtune.training import goodput
from jaxtune.training.phases import PhaseTimer
from jaxtune.weights import tree

NAME = 'run.json'
_CHECKPOINTS = 16  # the newest, of which it is known what they cost


def command_line(argv: Sequence[str]) -> str:
    """What to type to run this again."""
    return shlex.join(['python', '-m', 'jaxtune.main', *argv[1:]])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')


@dataclasses.dataclass
class RunInfo:
    """Facts about one run, gathered while it goes.

    Attributes:
      task: the recipe's.
      argv: the words of the command.
      recipe: its path.
      mesh: the mesh of devices, or None for a task that uses none.
      tokens_per_step: tokens of one step, padding included.
      timer: where its time goes.
      facts: what else there is to say, by the names that `run.json` has.
      flops_per_token: of a training step; None where that is not known.
      end: how it ended: `running` as long as it has not, and for ever if it is killed; `stopped` by Ctrl-C; `done`.
    """

    task: str
    argv: Sequence[str]
    recipe: str
    mesh: Mesh | None = None
    tokens_per_step: int = 0
    timer: PhaseTimer = dataclasses.field(default_factory=PhaseTimer)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    flops_per_token: float | None = None
    end: str = 'running'
    _good: dict[str, float] = dataclasses.field(default_factory=dict)
    _started: str = dataclasses.field(default_factory=_now)
    _earlier: dict[str, Any] | None = None

    def timed(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Adds the seconds inside to a phase."""
        return self.timer.timed(name)

    def describe_model(self, model: Model, params: Any, trainable: Any, opt_state: Any) -> None:
        """Notes what the model is and what it holds.

        Args:
          model: `models.Model`.
          params: all parameters.
          trainable: those that train; None where the others were.
          opt_state: the optimizer's state, or None where nothing trains.
        """
        self.facts['model'] = {
            'family': model.hf_config.get('model_type', model.kind),
            'layers': getattr(model.config, 'num_layers', None),
            'd_model': getattr(model.config, 'd_model', None),
            'heads': getattr(model.config, 'num_heads', None),
            'vocab_size': getattr(model.config, 'vocab_size', None),
            'parameters': tree.count(params),
            'trainable': tree.count(trainable),
            'weight_bytes': tree.nbytes(params),
            'copied_bytes': copied_bytes((params, opt_state)),
            'optimizer_bytes': tree.nbytes(opt_state),
            'flops_per_token': self.flops_per_token,
        }

    @functools.cached_property
    def peak_flops(self) -> float | None:
        """FLOPs a second of all devices at their best (see `hardware`); None where that is not known."""
        return hardware.peak_flops()

    def speed(self, steps_per_second: float, tokens_per_step: float | None = None) -> dict[str, float]:
        """`train/tokens_per_second`, `train/step_seconds` and, where the devices' peak is known, `train/mfu`.

        MFU is the share of the peak that the model's own FLOPs make up, nothing computed twice counted (Chowdhery et
        al. 2022, arXiv:2204.02311, appendix B). The peak is the published bfloat16 one, also for float32; on a CPU it
        is a measured float32 one.
        """
        tokens = steps_per_second * (tokens_per_step or self.tokens_per_step)
        metrics = {'train/tokens_per_second': tokens, 'train/step_seconds': 1 / max(steps_per_second, 1e-9)}
        if self.flops_per_token and self.peak_flops:
            metrics['train/mfu'] = self.flops_per_token * tokens / self.peak_flops
        return metrics

    def machine(self) -> dict[str, Any]:
        """The devices and the machine."""
        if 'hardware' not in self.facts:
            self.facts['hardware'] = hardware.describe()
        return self.facts['hardware']

    @functools.cached_property
    def _versions(self) -> dict[str, str]:
        return hardware.versions()

    def seconds(self) -> float:
        """Of this run and of earlier ones in the same workdir, which `write` has read."""
        return self.timer.seconds() + (self._earlier or {}).get('seconds', 0.0)

    def resume(self, workdir: pathlib.Path, step: int) -> None:
        """A run begins to train after this step, 0 or that of a checkpoint; what came later in `workdir` is lost."""
        if not console.is_primary():
            return
        metrics = workdir / METRICS
        alive = metrics.stat().st_mtime if metrics.is_file() else 0.0
        self._earlier = goodput.continued(_earlier(workdir), step, self._started, alive)
        self._good = {str(step): goodput.good(self._earlier['phases'])}
        self.write(workdir)  # when it began is known, whatever happens

    def saved(self, workdir: pathlib.Path, step: int) -> None:
        """The updates up to this one are in a checkpoint, or on their way there."""
        self._good[str(step)] = goodput.good(self._phases())
        self._good = dict(list(self._good.items())[-_CHECKPOINTS:])
        self.write(workdir)

    def goodput(self) -> float:
        """The share of the time since the first start in the workdir that went into updates that count, 0 to 1."""
        phases = self._phases()
        return goodput.good(phases) / max(self.seconds() + phases.get(goodput.DOWN, 0.0), 1e-9)

    def _phases(self) -> dict[str, float]:
        """Seconds by phase, of this run and of earlier ones that have been read."""
        phases = dict((self._earlier or {}).get('phases', {}))
        for name, seconds in self.timer.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
        return phases

    def write(self, workdir: pathlib.Path) -> None:
        """Writes `run.json`; phases and seconds of earlier runs in the same workdir are added. May be called again."""
        if not console.is_primary():
            return
        if self._earlier is None:
            self._earlier = _earlier(workdir)
        before, argv = self._earlier, list(self.argv)
        self.machine()
        write_json(
            workdir / NAME,
            {
                'task': self.task,
                'command': command_line(argv),
                'argv': argv,
                'recipe': self.recipe,
                'started': before.get('started', self._started),
                'ended': _now(),
                'end': self.end,
                'runs': before.get('runs', 0) + 1,
                'seconds': self.seconds(),
                'phases': self._phases(),
                'good': self._good,
                'versions': self._versions,
                'mesh': {} if self.mesh is None else dict(self.mesh.shape),
                'tokens_per_step': self.tokens_per_step,
                'peak_flops': self.__dict__.get('peak_flops'),
                **self.facts,
            },
        )


def _earlier(workdir: pathlib.Path) -> dict[str, Any]:
    """What earlier runs in the workdir wrote; nothing where that is damaged."""
    stored = read_mapping(workdir / NAME)
    stored = stored if isinstance(stored, dict) else {}
    earlier: dict[str, Any] = {}
    for name in ('phases', 'good'):
        values = stored.get(name)
        values = values if isinstance(values, dict) else {}
        earlier[name] = {key: value for key, value in values.items() if isinstance(value, int | float)}
    for name, kind in (('started', str), ('ended', str), ('end', str), ('runs', int), ('seconds', int | float)):
        if isinstance(stored.get(name), kind):
            earlier[name] = stored[name]
    return earlier


def compiled_memory(step: Any) -> dict[str, int]:
    """Bytes a device needs for a compiled step, by the compiler's estimate."""
    analysis = step.memory_analysis() if isinstance(step, jax.stages.Compiled) else None
    if analysis is None:
        return {}
    return {
        'argument_bytes': int(analysis.argument_size_in_bytes),
        'output_bytes': int(analysis.output_size_in_bytes),
        'alias_bytes': int(analysis.alias_size_in_bytes),
        'temp_bytes': int(analysis.temp_size_in_bytes),
    }


def data_facts(rows: Any) -> dict[str, Any]:
    """Rows, documents and tokens of the training data, as far as its source knows them; of a mixture, of all of it."""
    if isinstance(rows, Mixture):
        parts = [data_facts(part) for part in rows.parts.values()]
        whole = {name: sum(part.get(name, 0) for part in parts) for name in dict.fromkeys(itertools.chain(*parts))}
        # What only some sources count would read as if it were all of them.
        return {name: n for name, n in whole.items() if name != 'trained_tokens' or all(name in part for part in parts)}
    source, counts = getattr(rows, 'tokens', None), {'rows': len(rows), **getattr(rows, 'facts', {})}
    if source is not None:
        counts = {'documents': source.documents, 'tokens': len(source), **counts, 'text_bytes': source.text_bytes}
    return counts
