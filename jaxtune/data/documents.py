"""Documents: where `data.train` and `data.eval` point, read as a stream of texts as often as they are asked for."""

import dataclasses
import glob
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.data import stdlib
from jaxtune.errors import UserError

TEXT_SUFFIXES = ('.txt', '.md', '.rst')
RECORD_SUFFIXES = ('.jsonl', '.ndjson', '.json', '.parquet')
COMPRESSED_SUFFIXES = ('.gz', '.zst', '.bz2')
EXPECTED = 'expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE'


@dataclasses.dataclass(frozen=True)
class Documents:
    """A stream of texts that can be read again.

    Attributes:
      name: what the recipe calls it, `data.train=corpus/*.jsonl`; begins every message about it.
      identity: JSON values that change when the documents do.
      read: makes a new iterator over the texts.
    """

    name: str
    identity: Any
    read: Callable[[], Iterator[str]]

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


def open_documents(path: str, key: str = 'data.train', text_key: str = 'text') -> Documents:
    """Finds the documents that a recipe's key names.

    A file without a known suffix, and `.txt`, `.md` and `.rst`, is one document; `.jsonl` and `.json` hold records with
    the text in a field, `.parquet` rows with the text in a column; each may be compressed (`.gz`, `.zst`, `.bz2`). A
    folder is read in the order of its paths, with its folders, and without hidden files and unknown suffixes. A dataset
    is `ID`, `ID:CONFIG`, or `ID:CONFIG:SPLIT`.

    Args:
      path: the value of the key.
      key: its name, for messages.
      text_key: field or column that holds the text.

    Raises:
      UserError: nothing is there. Reading raises it too, with `file:line`, where a file is not what it should be.
    """
    name = f'{key}={path}'
    if not path:
        raise UserError(f"{key}='': {EXPECTED}")
    if path == 'python-stdlib':
        return Documents(name, stdlib.identity(), stdlib.documents)
    files = _files(path, name)
    if files is None:
        return _hub_dataset(path, name, key, text_key)
    identity = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def read() -> Iterator[str]:
        for file in files:
            yield from read_file(file, text_key)

    return Documents(name, [identity, text_key], read)


def read_file(file: pathlib.Path, text_key: str = 'text') -> Iterator[str]:
    """The documents of one file.

    Raises:
      UserError: `file:line` and what was expected there.
    """
    reader = {'.jsonl': _jsonl, '.ndjson': _jsonl, '.json': _json, '.parquet': _parquet}.get(_suffix(file), _whole)
    try:
        yield from reader(file, text_key)
    except UserError:
        raise
    except (OSError, EOFError) as error:  # pyarrow's and zlib's errors on damaged streams are OSErrors
        raise UserError(f'{file}: cannot be read: {" ".join(str(error).split())[:200]}') from None


def _suffix(file: pathlib.Path) -> str:
    name = file.name.lower()
    for ending in COMPRESSED_SUFFIXES:
        name = name.removesuffix(ending)
    return pathlib.PurePath(name).suffix


def _files(path: str, name: str) -> list[pathlib.Path] | None:
    """The files that a path, folder or glob means; None if it may be a dataset's id."""
    start = pathlib.Path(path).expanduser()
    if start.is_file():
        return [start]
    known = TEXT_SUFFIXES + RECORD_SUFFIXES
    if start.is_dir():
        files = _walk(start)
        if not files:
            raise UserError(
                f'{name}: the folder holds no data; expected files ending in {" ".join(known)} (or .gz, .zst)'
            )
        return files
    if glob.has_magic(path):
        found = [pathlib.Path(match) for match in sorted(glob.glob(str(start), recursive=True))]
        files = [file for match in found for file in (_walk(match) if match.is_dir() else [match])]
        if not files:
            raise UserError(f'{name}: no file matches; {EXPECTED}')
        return list(dict.fromkeys(files))
    if re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]*){0,2}', path) and _suffix(start) not in known:
        return None
    raise UserError(f'{name}: no such file; {EXPECTED}')


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    known = TEXT_SUFFIXES + RECORD_SUFFIXES
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        paths = [pathlib.Path(parent, name) for name in names if not name.startswith('.')]
        files += [path for path in paths if _suffix(path) in known]
    return sorted(files)


def _open(file: pathlib.Path) -> io.BufferedReader:
    import pyarrow  # slow to import

    return io.BufferedReader(pyarrow.input_stream(str(file), compression='detect'), 1 << 20)


def _whole(file: pathlib.Path, text_key: str) -> Iterator[str]:
    with _open(file) as stream:
        data = stream.read()
    try:
        yield data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: expected UTF-8 text, found the byte 0x{data[error.start]:02x}') from None


def _jsonl(file: pathlib.Path, text_key: str) -> Iterator[str]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = f'{file}:{number}'
                yield _text(_parse(line, place), place, text_key)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{place}: expected one JSON object on the line: {error.msg} (column {error.colno})') from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'{place}: expected one JSON object in UTF-8 on the line: {error}') from None


def _json(file: pathlib.Path, text_key: str) -> Iterator[str]:
    with _open(file) as stream:
        data = stream.read()
    try:
        records = json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg == 'Extra data':  # several values: lines of JSON under the wrong suffix
            yield from _jsonl(file, text_key)
            return
        raise UserError(f'{file}:{error.lineno}: expected JSON: {error.msg} (column {error.colno})') from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'{file}: expected JSON in UTF-8: {error}') from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield _text(record, f'{file}: record {number}', text_key)


def _parquet(file: pathlib.Path, text_key: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(str(file))
        if text_key not in table.schema_arrow.names:
            raise UserError(
                f'{file}: expected a column {text_key!r} (data.text_key); found {", ".join(table.schema_arrow.names)}'
            )
        row = 0
        for batch in table.iter_batches(columns=[text_key], batch_size=1024):
            for record in batch.to_pylist():
                row += 1
                yield _text(record, f'{file}: row {row}', text_key)
    except pyarrow.ArrowException as error:
        raise UserError(f'{file}: expected Parquet: {" ".join(str(error).split())[:200]}') from None


def _text(record: Any, place: str, text_key: str) -> str:
    """The text of one record."""
    if not isinstance(record, dict):
        raise UserError(
            f'{place}: expected an object with the text in {text_key!r} (data.text_key); found {record!r:.60}'
        )
    if text_key not in record:
        found = ', '.join(map(repr, list(record)[:8])) or 'none'
        raise UserError(f'{place}: expected the field {text_key!r} (data.text_key); found {found}')
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f'{place}: expected a text in {text_key!r} (data.text_key); found {text!r:.60}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start].encode('unicode_escape').decode()
        raise UserError(
            f'{place}: expected Unicode text in {text_key!r}; found half a surrogate pair, {broken}'
        ) from None
    return text


def _hub_dataset(path: str, name: str, key: str, text_key: str) -> Documents:
    """A dataset of the Hugging Face hub, as `ID`, `ID:CONFIG` or `ID:CONFIG:SPLIT`."""
    import datasets  # slow to import

    dataset_id, config, split, *_ = [*path.split(':'), '', '']
    try:
        splits = datasets.load_dataset(dataset_id, config or None)
    except Exception as error:  # network, names, rights, formats: each raises its own
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{name}: no such file or folder, and the hub gives no dataset of that id: {reason}') from None
    wanted = [split] if split else ['validation', 'eval', 'test'] if key == 'data.eval' else ['train']
    chosen = next((splits[option] for option in wanted if option in splits), None)
    if chosen is None:
        raise UserError(f'{name}: expected a split, as {dataset_id}:CONFIG:SPLIT; the dataset has {", ".join(splits)}')
    if text_key not in chosen.column_names:
        raise UserError(
            f'{name}: expected a column {text_key!r} (data.text_key); found {", ".join(chosen.column_names)}'
        )
    column = chosen.select_columns([text_key])

    def read() -> Iterator[str]:
        for row, record in enumerate(column, 1):
            yield _text(record, f'{name}: row {row}', text_key)

    return Documents(name, [path, chosen._fingerprint, text_key], read)
