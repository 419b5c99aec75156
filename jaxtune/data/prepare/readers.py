"""Reading units: each document with its place; what is broken is named, set aside and counted, and reading goes on."""

import bz2
import contextlib
import csv
import functools
import gzip
import io
import json
import lzma
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.data import stdlib
from jaxtune.data.prepare import Document, books, convert, sourcecode, web
from jaxtune.data.prepare.plan import Plan, Source
from jaxtune.data.prepare.sources import COMPRESSED, Unit, is_url
from jaxtune.data.records import open_records
from jaxtune.errors import UserError

SetAside = Callable[[str, str], None]


def read(unit: Unit, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    """The documents of a unit.

    Args:
      unit: what to read.
      plan: sources, keys and limits.
      set_aside: told the place and the reason of everything that could not be read.
    """
    source = plan.sources[unit.source]
    try:
        yield from _READERS[unit.format](unit, source, plan, set_aside)
    except UserError:  # a dataset that the hub does not give is no damaged file
        raise
    except Exception as error:  # damaged files raise what their libraries like; what was read before stays
        reason = str(error) or type(error).__name__
        set_aside(unit.path, f'{type(error).__name__}: {reason}' if isinstance(error, KeyError) else reason)


def _open(path: str) -> Any:
    """The bytes of a file, unpacked as a stream."""
    raw: Any = _raw(path)
    name = path.lower()
    if name.endswith('.gz'):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith('.bz2'):
        return bz2.BZ2File(raw)
    if name.endswith('.xz'):
        return lzma.LZMAFile(raw)
    if name.endswith('.zst'):
        import pyarrow  # slow to import, and seldom needed

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, 'r'), 'zstd'))
    return raw


def _whole(unit: Unit, plan: Plan, set_aside: SetAside) -> bytes | None:
    limit = plan.steps['limits.document_bytes']
    with _open(unit.path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        set_aside(unit.path, f'more than data.steps.limits.document_bytes={limit}')
        return None
    return data


def _lines(
    stream: io.BufferedIOBase, limit: int, path: str, set_aside: SetAside, end: int = 0
) -> Iterator[tuple[int, int, bytes]]:
    """`(number, offset, line)`; a line over the limit is passed over in pieces and set aside."""
    number, offset = 0, stream.tell()
    while not end or offset < end:
        line = stream.readline(limit + 1)
        if not line:
            return
        number += 1
        at = offset
        offset += len(line)
        if len(line) > limit and not line.endswith(b'\n'):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b'\n'):
                offset += len(rest)
            offset += len(rest)
            set_aside(f'{path}:{number}', f'a line of {offset - at:,} bytes; data.steps.limits.document_bytes={limit}')
            continue
        yield number, at, line


def _jsonl(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    limit = plan.steps['limits.document_bytes']
    with _open(unit.path) as stream:
        if unit.start:
            _skip_to(stream, unit.start)
        for number, at, line in _lines(stream, limit, unit.path, set_aside, unit.end):
            if not line.strip():
                continue
            # Counting the lines before a later piece of a large file would mean reading them.
            place = f'{unit.path}: byte {at}' if unit.start else f'{unit.path}:{number}'
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                set_aside(place, f'no JSON object in UTF-8: {error}')
                continue
            if (document := _record(record, place, source, plan, set_aside)) is not None:
                yield document


def _skip_to(stream: io.BufferedIOBase, start: int) -> None:
    """Moves to the first line that begins at or after a byte."""
    stream.seek(start - 1)
    while (rest := stream.readline(1 << 20)) and not rest.endswith(b'\n'):
        pass


def _record(record: Any, place: str, source: Source, plan: Plan, set_aside: SetAside) -> Document | None:
    if plan.records:
        try:
            return Document(place, *convert.checked(record, plan.format), record=record)
        except ValueError as error:
            set_aside(place, str(error))
            return None
    name = source.text_key or plan.keys['text_key']
    text = record.get(name) if isinstance(record, dict) else None
    if not isinstance(text, str):
        held = ', '.join(map(repr, list(record)[:8])) if isinstance(record, dict) else type(record).__name__
        set_aside(place, f'expected a text in {name!r} (data.text_key); found {held}')
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        set_aside(place, f'half a surrogate pair in {name!r}')
        return None
    kind = source.kind if source.kind != 'auto' else 'text'
    metadata = {
        key: record[key] for key in ('url', 'licence', 'license', 'language') if isinstance(record.get(key), str)
    }
    if kind == 'code':
        metadata['programming_language'] = sourcecode.language(str(record.get('path', '')))
    page = kind == 'web' and text.lstrip()[:200].lower().startswith(('<!doctype', '<html', '<?xml'))
    return Document(place, text, kind, page, metadata)


def _json(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    with _open(unit.path) as stream:
        data = stream.read(8 * plan.steps['limits.document_bytes'] + 1)
    try:
        records = json.loads(data)
    except json.JSONDecodeError as error:
        if error.msg != 'Extra data':
            raise
        yield from _jsonl(unit, source, plan, set_aside)
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        document = _record(record, f'{unit.path}: record {number}', source, plan, set_aside)
        if document is not None:
            yield document


def _parquet(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    from pyarrow import parquet  # slow to import, and seldom needed

    with _open(unit.path) as stream:
        table = parquet.ParquetFile(stream)
        row = 0
        for batch in table.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                row += 1
                document = _record(record, f'{unit.path}: row {row}', source, plan, set_aside)
                if document is not None:
                    yield document


def _csv(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    csv.field_size_limit(plan.steps['limits.document_bytes'])
    delimiter = '\t' if '.tsv' in unit.path.lower() else ','
    with io.TextIOWrapper(_open(unit.path), encoding='utf-8-sig', newline='') as stream:
        rows = csv.DictReader(stream, delimiter=delimiter)
        for record in rows:
            document = _record(record, f'{unit.path}:{rows.line_num}', source, plan, set_aside)
            if document is not None:
                yield document


def _html(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    data = _whole(unit, plan, set_aside)
    if data is not None:
        yield Document(unit.path, web.decode(data, html=True), _kind(source, 'web'), page=True)


def _kind(source: Source, detected: str) -> str:
    return detected if source.kind == 'auto' else source.kind


def _text(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    data = _whole(unit, plan, set_aside)
    if data is not None:
        yield Document(unit.path, web.decode(data), _kind(source, 'text'))


def _code(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    data = _whole(unit, plan, set_aside)
    if data is not None:
        metadata = {'programming_language': sourcecode.language(unit.path), 'licence': _licence(unit.path, unit.root)}
        yield Document(unit.path, web.decode(data), 'code', metadata=metadata)


def _licence(path: str, root: str) -> str:
    """The licence stated nearest to a file, from its folder up to the tree's root."""
    if not root or is_url(path):
        return ''
    folder = pathlib.Path(path).parent
    while True:
        if licence := _licence_of(folder):
            return licence
        if folder == pathlib.Path(root) or folder == folder.parent:
            return ''
        folder = folder.parent


@functools.lru_cache(4096)
def _licence_of(folder: pathlib.Path) -> str:
    for file in sorted(folder.iterdir()):
        if sourcecode.is_licence(file.name) and file.is_file():
            return sourcecode.licence(file.read_text(encoding='utf-8', errors='replace')[:20000])
    return ''


def _epub(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    data = _whole(unit, plan, set_aside)
    if data is not None:
        yield Document(unit.path, books.epub(data, plan.steps['limits.document_bytes']), _kind(source, 'books'))


def _xml(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    with _open(unit.path) as stream:
        for title, text in books.wikipedia(stream, plan.steps['limits.document_bytes']):
            yield Document(f'{unit.path}: {title}', text, 'wikipedia')


def _warc(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    from warcio.archiveiterator import ArchiveIterator  # of the data extra

    limit = plan.steps['limits.document_bytes']
    plain = unit.path.lower().endswith(COMPRESSED[1:])  # warcio unpacks gzip itself, a member a record
    with _open(unit.path) if plain else _raw(unit.path) as stream:
        for number, record in enumerate(_quietly(ArchiveIterator(stream, arc2warc=True)), 1):
            page = record.rec_type == 'response'
            if not page and record.rec_type != 'conversion':
                continue
            kind = (record.http_headers.get_header('Content-Type') or '') if page and record.http_headers else ''
            if page and kind and 'html' not in kind.lower():
                continue
            url = record.rec_headers.get_header('WARC-Target-URI') or ''
            place = f'{unit.path}: record {number} {url}'.rstrip()
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    data = record.content_stream().read(limit + 1)
                if len(data) > limit:
                    raise ValueError(f'more than data.steps.limits.document_bytes={limit}')
                charset = kind.lower().partition('charset=')[2].split(';')[0].strip(' "\'')
                text = web.decode(data, charset, html=page)
            except Exception as error:  # one record's own encodings and compressions; the next begins anew
                set_aside(place, str(error) or type(error).__name__)
                continue
            yield Document(place, text, _kind(source, 'web'), page=page, metadata={'url': url})


def _quietly(records: Iterator) -> Iterator:
    """The records of an iterator that writes what it thinks of them to stderr."""
    while True:
        with contextlib.redirect_stderr(io.StringIO()):
            record = next(records, None)
        if record is None:
            return
        yield record


def _raw(path: str) -> Any:
    if is_url(path):
        import fsspec  # of the data extra

        file: Any = fsspec.open(path, 'rb')
        return file.open()
    return pathlib.Path(path).expanduser().open('rb')


def _stdlib(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    if plan.records:
        for number, (name, record) in enumerate(convert.from_stdlib(plan.format), 1):
            place = f'{unit.path}: record {number}'
            yield Document(place, *convert.checked(record, plan.format), metadata={'group': name}, record=record)
        return
    kind = source.kind if source.kind != 'auto' else 'code'
    for number, text in enumerate(stdlib.documents(), 1):
        yield Document(f'{unit.path}: document {number}', text, kind, metadata={'programming_language': 'python'})


def _hub(unit: Unit, source: Source, plan: Plan, set_aside: SetAside) -> Iterator[Document]:
    for place, record in open_records(unit.path, source.key):
        document = _record(record, place, source, plan, set_aside)
        if document is not None:
            yield document


_READERS = {
    'jsonl': _jsonl, 'json': _json, 'parquet': _parquet, 'csv': _csv, 'html': _html, 'warc': _warc, 'epub': _epub,
    'text': _text, 'code': _code, 'xml': _xml, 'stdlib': _stdlib, 'hub': _hub,
}  # fmt: skip
