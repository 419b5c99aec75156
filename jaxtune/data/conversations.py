"""Rows of conversations, of which what the assistant writes is trained."""

import itertools
import pathlib
from typing import Any

from jaxtune.data import formats, holdout
from jaxtune.data.cache import prepared_tokens
from jaxtune.data.examples import ExampleRows, Examples, Source, encode_all, first_record
from jaxtune.data.spec import DataSpec


def holds_conversations(data: DataSpec, split: str) -> bool:
    """Whether a source holds conversations where texts are expected: by its format, or its first record's fields."""
    if data.format != 'auto' or prepared_tokens(data.path(split), holdout.key_of(data, split)) is not None:
        return data.format in formats.CHATS
    record = first_record(data, split)
    return formats.detect(record) in formats.CHATS and data.text_key not in record


def rows_of(data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path, train_on: str = 'all') -> ExampleRows:
    """Rows of `data.train` or `data.eval`: conversations of at most `seq_len` tokens, packed or one a row.

    The template becomes the tokenizer's own.

    Args:
      data: where they are.
      split: `train` or `eval`.
      tokenizer: makes their ids.
      cache: folder for what was read once.
      train_on: which answers are trained (`sft.train_on`).

    Raises:
      UserError: no such data, conversations that are none (with `file:line` and a count), or a template that fails.
    """
    source = Source(data, split, tokenizer, formats.CHATS)

    def build() -> Examples:
        chats = formats.read(
            source.records, lambda place, record: formats.chat(source.format, place, record), source.records.name
        )
        chats = [(place, source.prepared(chat)) for place, chat in chats]
        encoded, notes = encode_all(chats, source.encoder(train_on), data.seq_len, f'tokenise data.{split}')
        return Examples.of(itertools.chain.from_iterable(encoded), notes=notes)

    examples = source.cached(cache, f'data.{split}', ['sft', train_on, data.seq_len], build)
    return ExampleRows(examples, data.seq_len, data.packing)
