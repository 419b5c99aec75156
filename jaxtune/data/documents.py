"""Documents: the texts of the records that `data.train` and `data.eval` point to, as often as they are asked for."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.data.holdout import Recordwise
from jaxtune.data.records import Records, field, open_records
from jaxtune.errors import UserError


@dataclasses.dataclass(frozen=True)
class Documents:
    """A stream of texts that can be read again.

    Attributes:
      name: what the recipe calls it, `data.train=corpus/*.jsonl`; begins every message about it.
      identity: JSON values that change when the documents do.
      read: makes a new iterator over the texts.
      places: makes a new iterator over where each of them stands: `file:line`.
    """

    name: str
    identity: Any
    read: Callable[[], Iterator[str]]
    places: Callable[[], Iterator[str]] = lambda: iter(())

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def measure(self) -> tuple[int, int]:
        """Reads everything once: `(documents, UTF-8 bytes)`.

        Raises:
          UserError: a file is damaged, or there is no text at all.
        """
        count = size = 0
        for text in self:
            count += 1
            size += len(text.encode())
        if not size:
            raise UserError(f'{self.name}: the data is empty; expected at least one document with text')
        return count, size


def open_documents(
    path: str,
    key: str = 'data.train',
    text_key: str = 'text',
    select: Callable[[Records], Records] = lambda records: records,
) -> Documents:
    """Finds the documents that a recipe's key names: a text file is one, and so is each record's field `text_key`.

    Args:
      path: the value of the key, as `records.open_records` reads it.
      key: its name, for messages.
      text_key: field or column that holds the text.
      select: of the records those that are read.

    Raises:
      UserError: nothing is there. Reading raises it too, with `file:line`, where a file is not what it should be.
    """
    records = select(open_texts(path, key, text_key))

    def read() -> Iterator[str]:
        for place, record in records:
            yield field(record, place, text_key, 'data.text_key')

    return Documents(records.name, [records.identity, text_key], read, lambda: (place for place, _ in records))


def open_texts(path: str, key: str, text_key: str) -> Records:
    """The records of documents, of tables the one column."""
    return open_records(path, key, {text_key: 'data.text_key'}, text_key)


TEXTS = Recordwise(
    'texts',
    lambda data, key: open_texts(data.path('train'), key, data.text_key),
    lambda data, record: record.get(data.text_key) if isinstance(record, dict) else record,
)
