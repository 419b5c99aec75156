"""The documents that stay after the whole corpus is known, one task's at a time."""

import dataclasses
from collections.abc import Iterator

from jaxtune.data.prepare import Dropped, Work, shards, steps
from jaxtune.data.prepare.stats import Stats


@dataclasses.dataclass
class Candidate:
    """A document that passed the per-document steps.

    Attributes:
      number: among all documents.
      document: as collected.
      text: as the whole-corpus steps before left it.
      state: `shards.KEPT`, `EXACT` or `NEAR`.
      side, copies: as `assign_splits.assign_splits` says.
    """

    number: int
    document: shards.Stored
    text: str
    state: int
    side: int
    copies: int


class Remaining:
    """The documents of a task that stay, as they stay.

    Args:
      work: the folder between the phases, and the plan.
      rank: of the task.
      stats: counts what is dropped; None = nobody asks.
      without: a step that is left out, as what it needs is not known yet.
    """

    def __init__(self, work: Work, rank: int, stats: Stats | None = None, without: str = '') -> None:
        self.work, self.rank, self.stats = work, rank, stats or Stats()
        self.fates = shards.load(work.folder / 'fates' / f'{rank:05d}.npz')
        self.judges = [
            (step.name, step.corpus.open(work))
            for step in steps.asked_for(work.plan)
            if step.corpus is not None and step.name != without
        ]

    def __iter__(self) -> Iterator[Candidate]:
        states, sides, copies = (self.fates[name].tolist() for name in ('state', 'side', 'copies'))
        start = int(self.fates['start'])
        documents = shards.read(self.work.folder / 'documents' / f'{self.rank:05d}.jsonl.zst')
        for i, document in enumerate(documents):
            candidate = Candidate(start + i, document, document.text, states[i], sides[i], copies[i])
            if self._stays(candidate):
                label = self.work.plan.sources[document.source].label
                self.stats.source(label, 'kept', len(candidate.text.encode()))
                yield candidate

    def _stays(self, candidate: Candidate) -> bool:
        size = len(candidate.text.encode())
        for name, judge in self.judges:
            after = judge(candidate)
            if after is None:
                continue
            if isinstance(after, Dropped):
                excerpt = after.excerpt or candidate.text
                self.stats.dropped(name, size, after, candidate.document.id, excerpt)
                return False
            before, size = size, len(after.encode()) if after is not candidate.text else size
            self.stats.passed(name, before, size, size != before)
            candidate.text = after
        return True
