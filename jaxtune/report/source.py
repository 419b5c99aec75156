"""The files of one workdir, as far as they exist, for the report."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.common.io import read_mapping
from jaxtune.config import SCHEMA, OpenSubtree, is_rewarded, trains
from jaxtune.metrics.samples import read_samples
from jaxtune.metrics.writer import read_metrics

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Source:
    """One run's files.

    Attributes:
      name: the stage's name, or the workdir's.
      config: `config.json`, {} where there is none; so for the others.
      result: `result.json`.
      run: `run.json`.
      curves: metric -> `(step, value)` in the order of steps, from `metrics.jsonl`.
      samples: the objects of `samples.jsonl`.
      stats: `stats.json` of a preparation.
      compiled: `compile.json`.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    run: Mapping[str, Any]
    curves: Mapping[str, Points]
    samples: Sequence[Mapping[str, Any]]
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiled: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task of the recipe."""
        return self.result.get('task') or self.config.get('task') or 'train'

    @property
    def rewarded(self) -> bool:
        """Whether it trained on rewards."""
        return self.task != 'stages' and is_rewarded(self.task)

    @property
    def algorithm(self) -> str:
        """The reinforcement-learning algorithm, as its metrics name it; '' for other tasks."""
        if not self.rewarded:
            return ''
        groups = (name.split('/')[0] for name in self.curves if name.endswith('/reward'))
        return next((group for group in groups if group not in ('train', 'eval')), self.task.rsplit(':', 1)[-1])

    @property
    def titles(self) -> Mapping[str, str]:
        """Titles of metrics that the run's own plug-ins gave; see `jaxtune.metrics.names`."""
        titles = self.run.get('titles')
        return titles if isinstance(titles, Mapping) else {}

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The final metrics, of `result.json`."""
        return self.result.get('metrics') or {}

    def key(self, path: str, default: Any = None) -> Any:
        """The recipe's value at a dotted path."""
        node: Any = self.config
        for part in path.split('.'):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def metric(self, name: str) -> float | None:
        """A final metric: from the result, else the curve's last value."""
        value = self.metrics.get(name)
        if value is None and self.curves.get(name):
            value = self.curves[name][-1][1]
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def gzip(self) -> float | None:
        """Bits a byte of gzip -9 on the held-out documents."""
        names = [name for name in self.metrics if name.endswith('gzip_bits_per_byte')]
        return self.metric(names[0]) if names else self.run.get('gzip_bits_per_byte')

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the run, robust to slow first updates."""
        values = sorted(value for _, value in self.curves.get('train/tokens_per_second', ()))
        if values:
            return values[len(values) // 2]
        return next((self.metric(name) for name in self.metrics if name.endswith('tokens_per_second')), None)

    def recipe(self) -> list[tuple[str, Any, Any]]:
        """`(key, value, default)` of every key; the fields of an open subtree are keys without default."""
        rows = []
        for path, key in SCHEMA.items():
            if isinstance(key, OpenSubtree):
                rows += [(name, value, None) for name, value in _flat(self.key(path, {}), path)]
                continue
            value = self.key(path, key.default)
            rows.append((path, tuple(value) if isinstance(value, list) else value, key.default))
        return rows


def _flat(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [row for name, inner in value.items() for row in _flat(inner, f'{path}.{name}')]


def _curves(path: pathlib.Path) -> dict[str, Points]:
    curves: dict[str, dict[float, float]] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name != 'step' and isinstance(value, int | float) and not isinstance(value, bool) and value == value:
                curves.setdefault(name, {})[row['step']] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def read(folder: pathlib.Path, name: str = '') -> Source:
    """Reads a workdir; missing files are empty."""
    return Source(
        name or folder.absolute().name,
        read_mapping(folder / 'config.json') or {},
        read_mapping(folder / 'result.json') or {},
        read_mapping(folder / 'run.json') or {},
        _curves(folder / 'metrics.jsonl'),
        read_samples(folder),
        read_mapping(folder / 'stats.json') or {},
        read_mapping(folder / 'compile.json') or {},
    )


def main_stage(stages: Sequence[Source]) -> Source:
    """The stage that stands for a recipe: the last that trained, else the last with a loss, else the last."""
    trained = [stage for stage in stages if trains(stage.task)]
    scored = [stage for stage in stages if stage.metric('eval/loss') is not None]
    return (trained or scored or stages)[-1]
