"""Which records a run reads, and how they become rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.common.sources import DataSource
from jaxtune.data.holdout import Holdout


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """A recipe's data as a value.

    Attributes:
      train, eval: what `data.train` and `data.eval` name: a path ('' = nothing), or several sources.
      format: what a record looks like; `auto` = its fields tell.
      template: of conversations: `auto`, a name, or a Jinja text.
      template_args: what else the template is given, by name.
      seq_len: tokens in a row.
      target_len: tokens of a target in a row; 0 = `seq_len`.
      packing: several documents share a row.
      append_eos: each text document ends with the tokenizer's EOS.
      text_key, source_key, target_key: fields of a record.
      system: a system prompt for conversations without one.
      demonstrations: conversations that stand before every other one and are not trained on; '' = none.
      seed: of what is drawn while rows are made.
      labels_of: the model whose labels a classifier keeps where they cover the data's; '' = from scratch.
      default_labels: what labels are called where neither the data nor that model names any.
      holdout: which records of `train` are `eval`'s instead; None = each has records of its own.
      label: of the one source that this is, of several.
      whole: the data that this is a source of; None = all of it.
      vocab_size: rows of the model, which has none for ids from there on; 0 = not known.
    """

    train: str | tuple[DataSource, ...] = ''
    eval: str | tuple[DataSource, ...] = ''
    format: str = 'auto'
    template: str = 'auto'
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seq_len: int = 512
    target_len: int = 0
    packing: bool = True
    append_eos: bool = True
    text_key: str = 'text'
    source_key: str = 'source'
    target_key: str = 'target'
    system: str = ''
    demonstrations: str = ''
    seed: int = 0
    labels_of: str = ''
    default_labels: tuple[str, ...] = ()
    vocab_size: int = 0
    holdout: Holdout | None = None
    label: str = ''
    whole: DataSpec | None = None

    def sources(self, split: str) -> tuple[DataSource, ...]:
        """The sources of a split, `train` or `eval`, by label; a path is one without a label."""
        value = self.train if split == 'train' else self.eval
        if isinstance(value, str):
            return (DataSource('', value),) if value else ()
        return value

    def mixed(self, split: str) -> bool:
        """Whether the sources of a split have labels."""
        return not isinstance(self.train if split == 'train' else self.eval, str)

    def of(self, split: str, source: DataSource) -> DataSpec:
        """The data of one source alone: its path, and the formats and fields that it names instead of the recipe's."""
        named = ('format', 'text_key', 'source_key', 'target_key')
        changes = {name: value for name in named if (value := getattr(source, name))}
        return dataclasses.replace(self, **{split: source.path}, **changes, label=source.label, whole=self)

    def path(self, split: str) -> str:
        """The path of a split, of data that has one source there."""
        (source,) = self.sources(split) or (DataSource('', ''),)
        return source.path
