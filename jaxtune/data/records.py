"""Records: where `data.train` and `data.eval` point, read as a stream of objects, each with the place it stands at."""

import csv
import dataclasses
import glob
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtune.common import paths
from jaxtune.common.hub import is_dataset_id
from jaxtune.data import datasets_hub, stdlib
from jaxtune.data.files import is_regular, note_once, walk
from jaxtune.errors import UserError

TEXT_SUFFIXES = ('.txt', '.md', '.rst')
_LINES = ('.jsonl', '.ndjson', '.jsonlines', '.jl')
_TABLES = {'.csv': ',', '.tsv': '\t'}  # suffix -> what stands between cells
RECORD_SUFFIXES = (*_LINES, '.json', '.parquet', *_TABLES)
COMPRESSED_SUFFIXES = ('.gz', '.zst', '.bz2')
EXPECTED = 'expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE'

_LONGEST_CELL = 1 << 30

Placed = tuple[str, Any]

_KINDS = {str: 'a text', int: 'an integer', float: 'a number', list: 'a list', dict: 'an object', bool: 'a boolean'}


@dataclasses.dataclass(frozen=True)
class Records:
    """A stream of `(place, record)` that can be read again; a place is `file:line`, or as near as the format allows.

    Attributes:
      name: what the recipe calls it, `data.train=pairs.jsonl`; begins every message about it.
      identity: JSON values that change when the records do.
      read: makes a new iterator.
    """

    name: str
    identity: Any
    read: Callable[[], Iterator[Placed]]

    def __iter__(self) -> Iterator[Placed]:
        return self.read()


def open_records(
    path: str, key: str = 'data.train', columns: Mapping[str, str] | None = None, text_key: str = 'text'
) -> Records:
    """Finds the records that a recipe's key names.

    `.jsonl` (`.jsonlines`, `.jl`, `.ndjson`) holds one a line, `.json` one or a list of them, `.parquet` one a row,
    `.csv` and `.tsv` one a row after the names of the columns; `.txt`, `.md` and `.rst` are one record with the whole
    text under `text_key`, and so is, with a note, a file of another suffix. Each may be compressed (`.gz`, `.zst`,
    `.bz2`). A folder is read in the order of its paths, with its folders and what its links lead to, and without hidden
    files and unknown suffixes; of a prepare stage's workdir its `train.jsonl`, for `data.eval` its `eval.jsonl`. A
    dataset is `ID`, `ID:CONFIG`, or `ID:CONFIG:SPLIT`.

    Args:
      path: the value of the key.
      key: its name, for messages.
      columns: the fields wanted, each with the recipe key that names it ('' = none); None = all. A table without one
        is refused, and its other columns are not read; elsewhere `field` checks.
      text_key: where a text file's text stands in its record.

    Raises:
      UserError: nothing is there. Reading raises it too, with `file:line`, where a file is not what it should be.
    """
    name = f'{key}={path}'
    if not path:
        raise UserError(f"{key}='': {EXPECTED}")
    if path == 'python-stdlib':
        return Records(name, stdlib.identity(), lambda: _numbered(stdlib.documents(), path, text_key))
    files = find_files(path, key)
    if files is None:
        return _hub_dataset(path, name, key, columns)
    identity = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def read() -> Iterator[Placed]:
        for file in files:
            yield from read_file(file, columns, text_key)

    return Records(name, identity, read)


def read_file(file: pathlib.Path, columns: Mapping[str, str] | None = None, text_key: str = 'text') -> Iterator[Placed]:
    """The records of one file.

    Raises:
      UserError: `file:line` and what was expected there.
    """
    suffix = _suffix(file)
    try:
        if suffix in _LINES:
            yield from _jsonl(file)
        elif suffix in _TABLES:
            yield from _table(file, _TABLES[suffix])
        elif suffix == '.json':
            yield from _json(file)
        elif suffix == '.parquet':
            yield from _parquet(file, columns)
        else:
            if suffix not in TEXT_SUFFIXES:
                note_once(f'{file}: read as one text: {suffix or "no suffix"} is none of {" ".join(RECORD_SUFFIXES)}')
            yield str(file), {text_key: _whole(file)}
    except UserError:
        raise
    except (OSError, EOFError) as error:  # pyarrow's and zlib's errors on damaged streams are OSErrors
        raise UserError(f'{file}: cannot be read: {" ".join(str(error).split())[:200]}') from None


def field(record: Any, place: str, name: str, key: str = '', kind: type | tuple[type, ...] = str) -> Any:
    """One field of a record.

    Args:
      record: what `open_records` gave.
      place: where it stands.
      name: of the field.
      key: the recipe key that names it, for messages.
      kind: the type or types it must have; a text must be Unicode too.

    Raises:
      UserError: the record is no object, lacks the field, or has another kind of value there.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    named = f'{name!r} ({key})' if key else repr(name)
    expected = ' or '.join(_KINDS[each] for each in kinds)
    if not isinstance(record, dict):
        raise UserError(
            f'{place}: expected an object with the {expected.split(" ", 1)[1]} in {named}; found {record!r:.60}'
        )
    if name not in record:
        fields = ', '.join(map(repr, list(record)[:8])) or 'none'
        raise UserError(f'{place}: expected the field {named}; found {fields}')
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f'{place}: expected {expected} in {named}; found {value!r:.60}')
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            broken = value[error.start].encode('unicode_escape').decode()
            raise UserError(
                f'{place}: expected Unicode text in {name!r}; found half a surrogate pair, {broken}'
            ) from None
    return value


def _numbered(texts: Iterator[str], name: str, text_key: str) -> Iterator[Placed]:
    for number, text in enumerate(texts, 1):
        yield f'{name}: document {number}', {text_key: text}


def _suffix(file: pathlib.Path) -> str:
    name = file.name.lower()
    for ending in COMPRESSED_SUFFIXES:
        name = name.removesuffix(ending)
    return pathlib.PurePath(name).suffix


def find_files(path: str, key: str) -> list[pathlib.Path] | None:
    """The files that a recipe's key means; None if it may be a dataset's id.

    Raises:
      UserError: nothing is there.
    """
    return _prepared(path, key) or _files(path, f'{key}={path}')


def _prepared(path: str, key: str) -> list[pathlib.Path] | None:
    """The records of a split, where the path is the workdir of a prepare stage that left records."""
    folder = pathlib.Path(path).expanduser()
    if not (folder / 'manifest.json').is_file() or not (folder / 'train.jsonl').is_file():
        return None
    file = folder / ('eval.jsonl' if key == 'data.eval' else 'train.jsonl')
    if not file.is_file():
        raise UserError(f'{key}={path}: the prepared folder has no {file.name}; expected data.eval_fraction > 0 there')
    return [file]


def check_path(path: str, key: str) -> None:
    """Refuses a path where there is nothing; what is there is looked at when it is opened.

    Raises:
      UserError: names the key.
    """
    if path != 'python-stdlib' and not paths.local(path, key).is_dir():
        _files(path, f'{key}={path}')


def check_tables(path: str, key: str) -> None:
    """Refuses tables (`.csv`, `.tsv`): every cell is a text, so that no guess at what the columns are is a safe one.

    Raises:
      UserError: names the key and the file.
    """
    tables = (
        [] if path == 'python-stdlib' else [file for file in find_files(path, key) or () if _suffix(file) in _TABLES]
    )
    if tables:
        raise UserError(
            f'{key}={path}: {tables[0].name} is a table; expected data.format to say what its columns are: text '
            '(data.text_key names the column), pair, alpaca, prompt or preference'
        )


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
        matches = [pathlib.Path(match) for match in sorted(glob.glob(str(start), recursive=True))]
        files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
        files = [file for file in dict.fromkeys(files) if is_regular(file)]
        if not files:
            raise UserError(f'{name}: no file matches; {EXPECTED}')
        return files
    if start.exists() or start.is_symlink():
        is_regular(start)
        raise UserError(f'{name}: not a regular file; {EXPECTED}')
    if is_dataset_id(path) and _suffix(start) not in known:
        return None
    raise UserError(f'{name}: no such file; {EXPECTED}')


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    listed = walk(folder)
    files = [path for path in listed if _suffix(path) in TEXT_SUFFIXES + RECORD_SUFFIXES]
    others = sorted({_suffix(path) or path.name for path in listed} - {_suffix(path) for path in files})
    if others:
        note_once(
            f'{folder}: left out {len(listed) - len(files):,} of {len(listed):,} files, of unknown suffixes: '
            f'{" ".join(others[:8])}'
        )
    return [path for path in files if is_regular(path)]


def _open(file: pathlib.Path) -> io.BufferedReader:
    import pyarrow  # slow to import

    return io.BufferedReader(pyarrow.input_stream(str(file), compression='detect'), 1 << 20)


def _whole(file: pathlib.Path) -> str:
    with _open(file) as stream:
        data = stream.read()
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: expected UTF-8 text, found the byte 0x{data[error.start]:02x}') from None


def _jsonl(file: pathlib.Path) -> Iterator[Placed]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = f'{file}:{number}'
                yield place, _parse(line, place)


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{place}: expected one JSON object on the line: {error.msg} (column {error.colno})') from None
    except (ValueError, RecursionError) as error:  # no UTF-8, nested too deep, or a number of thousands of digits
        raise UserError(f'{place}: expected one JSON object in UTF-8 on the line: {_brief(error)}') from None


def _brief(error: Exception) -> str:
    return ' '.join(str(error).split(';')[0].split())[:200]


def _json(file: pathlib.Path) -> Iterator[Placed]:
    with _open(file) as stream:
        data = stream.read()
    try:
        records = json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg == 'Extra data':  # several values: lines of JSON under the wrong suffix
            yield from _jsonl(file)
            return
        raise UserError(f'{file}:{error.lineno}: expected JSON: {error.msg} (column {error.colno})') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{file}: expected JSON in UTF-8: {_brief(error)}') from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield f'{file}: record {number}', record


def _check_columns(columns: Mapping[str, str] | None, names: list[str], where: str) -> list[str] | None:
    for name, key in (columns or {}).items():
        if name not in names:
            named = f'{name!r} ({key})' if key else repr(name)
            raise UserError(f'{where}: expected a column {named}; found {", ".join(names)}')
    return None if columns is None else list(columns)


def _table(file: pathlib.Path, delimiter: str) -> Iterator[Placed]:
    csv.field_size_limit(_LONGEST_CELL)
    with io.TextIOWrapper(_open(file), encoding='utf-8-sig', newline='') as stream:
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except (csv.Error, ValueError) as error:
                raise UserError(f'{file}:{line}: expected a row of a table in UTF-8: {_brief(error)}') from None
            if row is None:
                return
            if not row:
                continue
            if names is None:
                names = row
                if len(set(names)) < len(names) or not all(names):
                    raise UserError(f'{file}:{line}: expected the names of the columns, each once; found {names!r:.80}')
            elif len(row) != len(names):
                raise UserError(f'{file}:{line}: expected {len(names)} cells, as there are columns; found {len(row)}')
            else:
                yield f'{file}:{line}', dict(zip(names, row, strict=True))


def _parquet(file: pathlib.Path, columns: Mapping[str, str] | None) -> Iterator[Placed]:
    from pyarrow import parquet  # slow to import, and seldom needed

    def expected(error: Exception) -> UserError:
        return UserError(f'{file}: expected Parquet: {" ".join(str(error).split())[:200]}')

    try:
        table = parquet.ParquetFile(str(file))
    except Exception as error:  # of the file's own: pyarrow raises many kinds
        raise expected(error) from None
    batches = table.iter_batches(columns=_check_columns(columns, table.schema_arrow.names, str(file)), batch_size=1024)
    row = 0
    while True:
        try:
            batch = next(batches, None)
            records = None if batch is None else batch.to_pylist()
        except Exception as error:
            raise expected(error) from None
        if records is None:
            return
        for record in records:
            row += 1
            yield f'{file}: row {row}', _without_nulls(record)


def _without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """A record of Arrow without what it fills in where others have a field: nulls within objects."""
    return {name: _filled(value) if isinstance(value, dict | list) else value for name, value in record.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(inner) for name, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _hub_dataset(path: str, name: str, key: str, columns: Mapping[str, str] | None) -> Records:
    """A dataset of the Hugging Face hub, as `ID`, `ID:CONFIG` or `ID:CONFIG:SPLIT`."""
    datasets_hub.check(path, name)
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
        raise UserError(
            f'{name}: expected a split, as {dataset_id}:CONFIG:SPLIT; the dataset has {", ".join(map(str, splits))}'
        )
    selected = _check_columns(columns, chosen.column_names, name)
    table: Any = chosen if selected is None else chosen.select_columns(selected)

    def read() -> Iterator[Placed]:
        for row, record in enumerate(table, 1):
            yield f'{name}: row {row}', _without_nulls(record)

    return Records(name, [path, chosen._fingerprint], read)
