"""`data.eval=auto`: a share of the records of `data.train` is held out, by what they say, and never trained on."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.common.io import read_mapping, write_json
from jaxtune.data.prepare.assign_splits import held_out
from jaxtune.data.records import Placed, Records
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jaxtune.data.spec import DataSpec

_VERSION = 1  # of how records are scored: another number makes the caches anew


@dataclasses.dataclass(frozen=True)
class Recordwise:
    """How the records that an objective learns from are found and told apart.

    Attributes:
      name: of these functions, which caches depend on.
      open: the records of a source, of a recipe's key.
      content: what a record says, JSON values: two that say the same are on the same side.
    """

    name: str
    open: 'Callable[[DataSpec, str], Records]'
    content: 'Callable[[DataSpec, Any], Any]'


@dataclasses.dataclass(frozen=True)
class Holdout:
    """Which records are held out: those whose score is below a fraction, with exceptions so that no side is empty.

    Attributes:
      fraction: of the records.
      seed: which ones.
      recordwise: how they are told apart; None as long as it is not decided.
      added: scores that are held out too, of sources of which nothing else would be.
      spared: scores that are not held out, of sources of which nothing else would be trained on.
    """

    fraction: float
    seed: int
    recordwise: Recordwise | None = None
    added: tuple[float, ...] = ()
    spared: tuple[float, ...] = ()

    @property
    def identity(self) -> list[Any]:
        """JSON values that change when other records are held out."""
        name = self.recordwise.name if self.recordwise else ''
        return [_VERSION, name, self.fraction, self.seed, list(self.added), list(self.spared)]

    def score(self, content: Any) -> float:
        """A hash of what a record says and the seed, as a number in 0 … 1; white space does not count."""
        text = json.dumps([self.seed, _plain(content)], sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
        return int.from_bytes(digest, 'big') / 2.0**64

    def holds(self, score: float) -> bool:
        """Whether a record of that score is held out."""
        return (score < self.fraction or score in self.added) and score not in self.spared

    def decided(self, scores: Mapping[str, np.ndarray]) -> 'Holdout':
        """With the exceptions that these sources need; what is one of a source is one of all, as texts may meet.

        Args:
          scores: label -> the score of each of its records.

        Raises:
          UserError: a source has nothing to hold out, or nothing to train on.
        """
        added, spared = set(), set()
        for values in scores.values():
            if len(values):
                chosen = held_out(np.ones(len(values), bool), values, self.fraction)
                added |= set(values[chosen & (values >= self.fraction)].tolist())
                spared |= set(values[~chosen & (values < self.fraction)].tolist())
        decided = dataclasses.replace(self, added=tuple(sorted(added - spared)), spared=tuple(sorted(spared)))
        for label, values in scores.items():
            count = decided.count(values)
            if not 0 < count < len(values):
                different, source = len(set(values.tolist())), f'the source {label!r}' if label else 'data.train'
                raise UserError(
                    f'data.eval=auto: {source} has {len(values):,} records, {different:,} of them different, and '
                    f'{count:,} would be held out; expected one at least to hold out and one to train on (a text file '
                    'is one record), or data.eval of its own'
                )
        return decided

    def count(self, scores: Iterable[float]) -> int:
        """How many of some scores are held out."""
        return sum(map(self.holds, scores))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return ' '.join(value.split())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return {str(name): _plain(part) for name, part in value.items()} if isinstance(value, Mapping) else value


def is_prepared(path: str) -> bool:
    """Whether a path is the workdir of a prepare stage, which has held out its own share."""
    folder = pathlib.Path(path).expanduser()
    records = (folder / 'manifest.json').is_file() and (folder / 'train.jsonl').is_file()
    return records or any((folder / split / 'meta.json').is_file() for split in ('train', 'eval'))


def key_of(data: 'DataSpec', split: str) -> str:
    """The recipe's key whose records a split of a source is read from, for `open_records` and messages."""
    return 'data.train' if data.holdout and not is_prepared(data.path(split)) else f'data.{split}'


def part(records: Records, data: 'DataSpec', split: str) -> Records:
    """Of the records of a source those of a split: all, but for `data.eval=auto`.

    Args:
      records: opened by `key_of`.
      data: the source.
      split: `train` or `eval`.
    """
    holdout = data.holdout
    if holdout is None or is_prepared(data.path(split)):
        return records
    recordwise = holdout.recordwise
    assert recordwise is not None  # `decide` came before

    def read() -> Iterator[Placed]:
        for place, record in records:
            if holdout.holds(holdout.score(recordwise.content(data, record))) == (split == 'eval'):
                yield place, record

    return Records(records.name, [records.identity, holdout.identity, *_fields(data), split], read)


def _fields(data: 'DataSpec') -> tuple[str, ...]:
    return data.text_key, data.source_key, data.target_key


def words(counts: Mapping[str, tuple[int, int]]) -> str:
    """What `decide` counted, for people."""
    if not counts:
        return 'data.eval=auto: what the prepare stage held out'
    held, total = (sum(column) for column in zip(*counts.values(), strict=True))
    parts = ', '.join(f'{label} {held:,} of {total:,}' for label, (held, total) in counts.items() if label)
    by_label = f' ({parts})' if parts else ''
    return f'data.eval=auto: {held:,} of {total:,} records of data.train are held out{by_label}'


def decide(data: 'DataSpec', recordwise: Recordwise, cache: pathlib.Path) -> tuple[Holdout, dict[str, tuple[int, int]]]:
    """What is held out of the sources of `data.train`, and label -> `(records held out, records)`.

    All records are read once for it, and what was decided is kept in the cache.

    Raises:
      UserError: as `Holdout.decided`, or the data is wrong.
    """
    from jaxtune.data.cache import once  # which reads parts, too

    assert data.holdout is not None
    holdout = dataclasses.replace(data.holdout, recordwise=recordwise)
    specs = {source.label: data.of('train', source) for source in data.sources('train')}
    specs = {label: spec for label, spec in specs.items() if not is_prepared(spec.path('train'))}
    records = {label: recordwise.open(spec, 'data.train') for label, spec in specs.items()}
    identity = [[label, one.identity, _fields(specs[label])] for label, one in records.items()]
    digest = hashlib.sha256(json.dumps([holdout.identity, identity]).encode()).hexdigest()
    file = cache / f'holdout-{digest[:16]}.json'

    def build() -> None:
        scores = {
            label: np.array([holdout.score(recordwise.content(specs[label], record)) for _, record in one], np.float64)
            for label, one in records.items()
        }
        found = holdout.decided(scores)
        counts = {label: [found.count(values.tolist()), len(values)] for label, values in scores.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {'added': list(found.added), 'spared': list(found.spared), 'counts': counts})

    once(file.is_file, build, 'data.eval=auto')
    stored = read_mapping(file) or {}
    try:
        found = dataclasses.replace(holdout, added=tuple(stored['added']), spared=tuple(stored['spared']))
        return found, {label: (held, total) for label, (held, total) in stored['counts'].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f'{file}: damaged; expected what an earlier run cached there') from None
