"""Which records a run reads, and how they become rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """A recipe's data as a value.

    Attributes:
      train, eval: what `data.train` and `data.eval` name; '' = nothing.
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
    """

    train: str = ''
    eval: str = ''
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

    def path(self, split: str) -> str:
        """What the key of a split, `train` or `eval`, names."""
        return self.train if split == 'train' else self.eval
