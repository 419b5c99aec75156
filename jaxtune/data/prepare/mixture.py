"""Documents of a source with a weight below 1 that its share leaves out."""

from collections.abc import Callable

from jaxtune.data.prepare import Dropped, Step, WholeCorpus, Work
from jaxtune.data.prepare.remaining import Candidate


def _open(work: Work) -> Callable[[Candidate], str | None]:
    return lambda candidate: None if candidate.copies else Dropped('weight of its source below 1')


STEP = Step('mixture', 'weights of the sources below 1', corpus=WholeCorpus(_open))
