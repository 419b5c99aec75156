"""What lies between the phases: documents of one task in a compressed file, with an index of what they are like."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtune.common import io

# What becomes of a document.
KEPT, EXACT, NEAR = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Stored:
    """A document that passed the filters.

    Attributes:
      source: number of its source.
      id: where it stood.
      text: cleaned.
      kind, metadata: as read.
      record: of instruction and preference data.
    """

    source: int
    id: str
    text: str
    kind: str
    metadata: dict[str, Any]
    record: Any = None


class Writer:
    """Writes the documents of a task; the file appears whole, on `close`."""

    def __init__(self, path: pathlib.Path) -> None:
        import pyarrow  # slow to import, and seldom needed

        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._place = contextlib.ExitStack()
        file = pyarrow.PythonFile(self._place.enter_context(io.atomic_file(path, sync=False)), 'w')
        self._file = pyarrow.CompressedOutputStream(file, 'zstd')

    def add(self, document: Stored) -> None:
        """Writes a document."""
        row = [document.source, document.id, document.text, document.kind, document.metadata, document.record]
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b'\n')

    def close(self) -> None:
        """Puts the file in its place."""
        self._file.close()
        self._place.close()


def read(path: pathlib.Path) -> Iterator[Stored]:
    """The documents of a task, in order."""
    import pyarrow  # slow to import, and seldom needed

    with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), 'rb'), 'zstd') as packed:
        for line in _lines(packed):
            yield Stored(*json.loads(line))


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b''
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b'\n')
        yield from lines
    if rest:
        yield rest


def save(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes arrays whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_file(path, sync=False) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]: none of the arrays is called allow_pickle


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads them again."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def save_array(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes an array whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_file(path, sync=False) as file:
        np.save(file, values, allow_pickle=False)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_text(path, text, sync=False)
