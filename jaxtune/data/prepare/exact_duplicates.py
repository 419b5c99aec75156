"""Documents whose text an earlier one has, white space aside, are dropped."""

from collections.abc import Callable

from jaxtune.data.prepare import Dropped, Step, WholeCorpus, Work, assign_splits, shards
from jaxtune.data.prepare.remaining import Candidate


def _judge(candidate: Candidate) -> str:
    return Dropped('the same text before') if candidate.state == shards.EXACT else candidate.text


def _open(work: Work) -> Callable[[Candidate], str | None]:
    return _judge


STEP = Step(
    'exact duplicates',
    'the same text, white space aside',
    corpus=WholeCorpus(_open, index=lambda settings: assign_splits.Digests()),
)
