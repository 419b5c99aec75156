"""Training objectives: how examples become a batch, and a loss as sums.

A new one is a module here with an `Objective`, and a line in `OBJECTIVES`; a recipe may name another as `module:NAME`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jaxtune.common.registry import Registry
from jaxtune.errors import UserError

# The names below are a recipe's choices, which are checked before anything slow is imported.
if TYPE_CHECKING:
    import pathlib

    import jax

    from jaxtune.common.settings import Settings
    from jaxtune.common.sources import DataSource
    from jaxtune.data.holdout import Recordwise
    from jaxtune.data.spec import DataSpec
    from jaxtune.models import Model

Batch = Mapping[str, 'jax.Array']
BatchSpec = dict[str, 'jax.ShapeDtypeStruct']
# A summed loss, the number of what it was summed over (float32 scalars), and further sums over the same count, or pairs
# of a sum and a count of its own: so accumulation and many devices give exactly the big batch's mean.
Sums = tuple['jax.Array', 'jax.Array', dict[str, Any]]
# `(params, batch) -> {name: (sum, count)}`
Statistics = Callable[[Any, Batch], dict[str, tuple['jax.Array', 'jax.Array']]]


class Rows(Protocol):
    """Numbered rows, dicts of arrays: a `grain` source or `MapDataset`.

    They may have `facts` (counts, for the log), `baselines` (metrics that need no model) and `tokens` (their source).
    """

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """The row with a number."""
        ...


class BatchSpecOf(Protocol):
    """What one row of a batch holds, without the batch's axis."""

    def __call__(self, settings: Settings, data: DataSpec) -> BatchSpec:
        """See the class."""
        ...


class DatasetOf(Protocol):
    """Rows of a split, `train` or `eval`; `cache` is the folder for tokenised data."""

    def __call__(self, settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> Any:
        """See the class."""
        ...


class LossOf(Protocol):
    """The summed loss of a batch; `rng` is None in evaluation, where nothing is drawn."""

    def __call__(self, settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        """See the class."""
        ...


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a loss must know of a reference model, asked once for all rows before training.

    Attributes:
      path: of the settings: the model's folder, workdir or hub id; '' = the model as training begins; None = none.
      key: of the recipe, that names it.
      sides: of the settings: suffixes of the fields `reference_SIDE`.
      logps: `(model, params, batch, sides) -> [rows, sides]`, what becomes these fields.
    """

    path: Callable[[Settings], str | None]
    key: str
    sides: Callable[[Settings], tuple[str, ...]]
    logps: Callable[[Model, Any, Batch, tuple[str, ...]], jax.Array]


# Name under which a batch holds the teacher, a `models.frozen.FrozenModel`.
TEACHER = 'teacher'


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model that the loss asks in every step, and finds in its batch as `TEACHER`.

    It has the tokenizer of the model that learns; whatever else it is, it is a decoder where that is one.

    Attributes:
      path: of the settings: the model's folder, workdir or hub id.
      key: of the recipe, that names it.
    """

    path: Callable[[Settings], str]
    key: str


def _no_statistics(settings: Settings) -> None:
    return None


def _no_extra_vocab(settings: Settings, data: DataSpec, tokenizer: Any) -> int:
    return 0


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training objective. Its functions get the recipe's subtree of its name.

    Attributes:
      name: what a recipe calls it.
      batch_spec: what one row of a batch holds.
      dataset: rows of a split.
      loss: the summed loss.
      kinds: of models that it suits.
      head: what follows the model's last layer: `lm`, `classification` or `reward`.
      label_fields: where the head has labels: Hugging Face's `id2label` and `label2id`.
      extra_vocab: how many ids the model must have beyond the tokenizer's.
      statistics: of the settings: what the loss must know of the whole batch (in evaluation: of all held-out rows)
        before it, `(model, params, batch) -> {name: (sum, count)}`, or None; the loss finds the means in its batch by
        these names, and no gradient goes through them.
      reference: what it must know of a reference model.
      teacher: what it asks in every step.
      summarise: `(sums, count) -> metrics` of an evaluation, where not the means.
      preview: `(rows, tokenizer) -> [(text, trained)]`, an example as the model will see it.
      rows_per_example: rows of the model that one row of a batch is.
      counted: what the count of the loss counts.
      prompt_tokens: for `eval.samples`: the first so many tokens of a text are its prompt, 0 = the text's own prompt;
        None = its models do not write.
      auto_class: `AutoModelFor…` of `transformers` that loads what it trains.
      titles: of its own metrics, for the report.
      higher_is_better: those of its own metrics of which a higher value is better.
      by_position: its loss gives the sums of `objectives.by_position` where a batch asks for them.
      records: how its records are told apart, for `data.eval=auto`, which without it is refused; `dataset` reads them
        through `jaxtune.data.holdout.part`.
    """

    name: str
    batch_spec: BatchSpecOf
    dataset: DatasetOf
    loss: LossOf
    kinds: tuple[str, ...] = ('decoder', 'encoder', 'encdec')
    head: str = 'lm'
    label_fields: Callable[[Settings, DataSpec], dict[str, Any]] | None = None
    extra_vocab: Callable[[Settings, DataSpec, Any], int] = _no_extra_vocab
    statistics: Callable[[Settings], Callable[[Model, Any, Batch], dict[str, Any]] | None] = _no_statistics
    reference: Reference | None = None
    teacher: Teacher | None = None
    summarise: Callable[[dict[str, float], float], dict[str, float]] | None = None
    preview: Callable[[Any, Any], Sequence[tuple[str, bool]]] | None = None
    rows_per_example: int = 1
    counted: str = 'tokens'
    prompt_tokens: int | None = None
    auto_class: str = 'CausalLM'
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    higher_is_better: tuple[str, ...] = ()
    by_position: bool = False
    records: Recordwise | None = None


OBJECTIVES = Registry(
    'objective',
    Objective,
    {
        'causal_lm': 'jaxtune.objectives.causal_lm:OBJECTIVE',
        'masked_lm': 'jaxtune.objectives.masked_lm:OBJECTIVE',
        'span_corruption': 'jaxtune.objectives.span_corruption:OBJECTIVE',
        'seq2seq': 'jaxtune.objectives.seq2seq:OBJECTIVE',
        'classification': 'jaxtune.objectives.classification:OBJECTIVE',
        'sft': 'jaxtune.objectives.sft:OBJECTIVE',
        'reward': 'jaxtune.objectives.reward:OBJECTIVE',
        'dpo': 'jaxtune.objectives.dpo:OBJECTIVE',
        'distill': 'jaxtune.objectives.distill:OBJECTIVE',
    },
)


@dataclasses.dataclass(frozen=True)
class BoundObjective:
    """An objective with the settings and the data of a recipe.

    Attributes:
      objective: what is learnt.
      settings: its subtree of the recipe.
      data: which records, and how they become rows.
    """

    objective: Objective
    settings: Settings
    data: DataSpec

    def batch_spec(self) -> BatchSpec:
        """What one row of a batch holds."""
        return self.objective.batch_spec(self.settings, self.data)

    def dataset(self, split: str, tokenizer: Any, cache: pathlib.Path, vocab_size: int = 0) -> Any:
        """Rows of `train` or `eval`; of several sources a `Mixture`.

        Args:
          split: which.
          tokenizer: makes their ids.
          cache: folder for what was read once.
          vocab_size: rows of the model, for which a text is refused that holds a token without one; 0 = any is fine.

        Raises:
          UserError: the data is wrong.
        """
        from jaxtune.data.mixture import Mixture  # of names alone, which the schema checks, nothing slow is imported

        data = dataclasses.replace(self.decided(cache, said=split == 'eval'), vocab_size=vocab_size)
        sources = data.sources(split)

        def rows(source: DataSource) -> Any:
            return self.objective.dataset(self.settings, data.of(split, source), split, tokenizer, cache)

        if not data.mixed(split):
            return rows(*sources)
        return Mixture(
            {source.label: rows(source) for source in sources}, {source.label: source.weight for source in sources}
        )

    def decided(self, cache: pathlib.Path, said: bool = False) -> DataSpec:
        """The data, with what `data.eval=auto` holds out; `said` prints how much that is.

        Raises:
          UserError: there is too little of it, or the objective does not tell records apart.
        """
        if self.data.holdout is None:
            return self.data
        from jaxtune.data import holdout  # as above

        if self.objective.records is None:
            raise UserError(
                f'data.eval=auto: objective={self.objective.name} does not say what its records are; expected held-out '
                'data of its own'
            )
        found, counts = holdout.decide(self.data, self.objective.records, cache)
        if said:
            from jaxtune.common import console  # as above

            console.note(holdout.words(counts))
        return dataclasses.replace(self.data, holdout=found)

    def loss(self, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        """The summed loss of a batch."""
        return self.objective.loss(self.settings, model, params, batch, rng)

    def statistics(self, model: Model) -> Statistics | None:
        """What the loss must know of the whole batch before it."""
        function = self.objective.statistics(self.settings)
        return None if function is None else functools.partial(function, model)

    def extra_vocab(self, tokenizer: Any) -> int:
        """How many ids the model must have beyond the tokenizer's."""
        return self.objective.extra_vocab(self.settings, self.data, tokenizer)

    def label_fields(self) -> dict[str, Any]:
        """Hugging Face's fields of the labels, where the head has some."""
        return self.objective.label_fields(self.settings, self.data) if self.objective.label_fields else {}
