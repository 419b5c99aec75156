"""Preparation: documents are collected, cleaned, filtered, deduplicated, tokenised and built into a training set.

The pipeline is a list of phases, `(name, what it does, function)`, that `tasks/prepare.py` runs one after the other.
`phases` has those of a recipe with steps, cut into tasks for many processes or machines (the extra `[data]` is needed);
`streaming` has those of a recipe without: documents as they come, in this process.

Within the phases each document goes through the steps that `steps.STEPS` lists, in that order. A step is one file with
a `Step` in it.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxtune.common.settings import Settings
from jaxtune.data.prepare.plan import Plan, Source

if TYPE_CHECKING:
    import numpy as np

    from jaxtune.data.prepare.assign_splits import Corpus
    from jaxtune.data.prepare.remaining import Candidate
    from jaxtune.data.prepare.shards import Stored

HELD_OUT = 'eval.jsonl'  # the held-out documents as text
_NOWHERE = Source('', '')


class Dropped(str):
    """The reason why a document is dropped, instead of its text.

    Args:
      reason: a few words; documents are counted by them.
      excerpt: the text that the report shows as an example; '' = the text that the step was given.
    """

    excerpt: str

    def __new__(cls, reason: str, excerpt: str = '') -> 'Dropped':
        """A text with one attribute more."""
        dropped = super().__new__(cls, reason)
        dropped.excerpt = excerpt
        return dropped


@dataclasses.dataclass
class Document:
    """A document on its way through the per-document steps.

    Attributes:
      id: its place: `file:line`, or as near as the format allows.
      text: as the steps before left it.
      kind: `text`, `web`, `books`, `code`, `wikipedia` or `records`: which rules suit it.
      page: whether the text still is HTML.
      metadata: `language`, `licence`, `url`, as far as they are known; documents of one `group` stay in one split.
      record: the whole record of instruction and preference data, else None; `text` then is all its texts, one a line,
        and the record is what is kept.
      source: where it comes from.
    """

    id: str
    text: str
    kind: str
    page: bool = False
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: Any = None
    source: Source = _NOWHERE


@dataclasses.dataclass(frozen=True)
class Work:
    """What every task of every phase is given.

    Attributes:
      folder: where phases leave their results for those behind them; all tasks see it.
      plan: what the recipe asks for.
      tasks: into how many tasks the sources are cut.
    """

    folder: pathlib.Path
    plan: Plan
    tasks: int


def one_task(work: Work) -> int:
    """Of a phase that is not cut."""
    return 1


def task_of_each_source_part(work: Work) -> int:
    """Of a phase that is cut as the sources are."""
    return work.tasks


class Phase(NamedTuple):
    """A part of the pipeline whose tasks know nothing of each other.

    Attributes:
      name: in progress bars, logs and names of jobs.
      about: what it does, in a line.
      run: does a task, `run(work, rank)`; what it leaves appears whole or not at all. Those of `streaming` are one task
        each, `run()`.
      tasks: how many there are.
    """

    name: str
    about: str
    run: Callable[..., None]
    tasks: Callable[[Work], int] = one_task


class Index(Protocol):
    """What a whole-corpus step notes of each document that passed the per-document steps, in one task."""

    def add(self, document: 'Stored') -> None:
        """Takes in a document."""

    def save(self, folder: pathlib.Path, rank: int) -> None:
        """Writes what was noted below the folder of `Work`, under the number of the task."""


@dataclasses.dataclass(frozen=True)
class WholeCorpus:
    """The part of a step that must know all documents before it can judge one.

    Attributes:
      open: reads what was found; returns the function that judges a document: its text, `Dropped`, or None where the
        step does not concern it, which is not counted.
      index: what is noted of each document while it is collected; None = nothing.
      before_splits: phases between collecting and the assignment of splits.
      at_splits: runs in the phase that assigns them, with the corpus and the state of each document, `[documents]`.
      after_splits: phases behind it.
    """

    open: Callable[[Work], Callable[['Candidate'], str | None]]
    index: Callable[[Settings], Index] | None = None
    before_splits: tuple[Phase, ...] = ()
    at_splits: 'Callable[[Work, Corpus, np.ndarray], None] | None' = None
    after_splits: tuple[Phase, ...] = ()


def _always(*arguments: Any) -> bool:
    return True


def _nothing(settings: Settings) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of preparation: a line of `stats.json` and of the report.

    It judges each document by itself (`process`), or knows the whole corpus first (`corpus`). `settings` are the values
    of `data`: `settings.min_chars`, `settings.steps.filter.max_chars`.

    Attributes:
      name: of the line; what it drops is the metric `data/dropped_NAME`.
      about: what it does, in a few words beside the name.
      process: a document and the settings to its text, changed or not, or to `Dropped(reason)`. It may change
        `metadata` and `record` in place, and must be a function of its arguments alone: a task may run twice.
      applies: whether it concerns a document; one that it does not is not counted.
      on: whether the recipe asks for it.
      load: called once a task before its first document: opens what the step needs.
      corpus: of a whole-corpus step, instead of `process`.
    """

    name: str
    about: str
    process: Callable[[Document, Settings], str] | None = None
    applies: Callable[[Document, Settings], bool] = _always
    on: Callable[[Settings], bool] = _always
    load: Callable[[Settings], None] = _nothing
    corpus: WholeCorpus | None = None
