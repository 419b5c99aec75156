"""Finding what a source holds: files cut into units, units gathered into tasks, the same whatever runs them."""

import dataclasses
import glob
import pathlib
import re
from typing import Any

from jaxtune.common.hub import is_dataset_id
from jaxtune.data import datasets_hub, stdlib
from jaxtune.data.files import is_regular, note_once, walk
from jaxtune.data.prepare import sourcecode
from jaxtune.data.prepare.plan import Source
from jaxtune.errors import UserError

COMPRESSED = ('.gz', '.bz2', '.zst', '.xz')
_FORMATS = {
    '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.jsonlines': 'jsonl', '.jl': 'jsonl', '.json': 'json',
    '.parquet': 'parquet', '.csv': 'csv', '.tsv': 'csv',
    '.html': 'html', '.htm': 'html', '.xhtml': 'html', '.warc': 'warc', '.wet': 'warc', '.arc': 'warc',
    '.epub': 'epub', '.txt': 'text', '.md': 'text', '.rst': 'text', '.xml': 'xml',
}  # fmt: skip
_CUT = 4 << 20  # a file of lines is read in pieces of so many bytes
_TASK, _MOST_TASKS = 4 << 20, 2000


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file, or the lines of it that begin in a range of bytes.

    Attributes:
      source: its place among the plan's sources.
      path: local path or URL.
      format: how it is read: `jsonl`, `json`, `parquet`, `csv`, `html`, `warc`, `epub`, `text`, `code`, `xml`,
        `stdlib` or `hub`.
      size: bytes on disk of this part.
      start, end: range of bytes; `end` is 0 for a whole file.
      mark: changes when the file does.
      root: of a source tree, above which no licence is looked for.
    """

    source: int
    path: str
    format: str
    size: int
    start: int = 0
    end: int = 0
    mark: str = ''
    root: str = ''


def is_url(path: str) -> bool:
    """Whether a path is one for fsspec."""
    return bool(re.match(r'[a-z][a-z0-9+.-]*://', path))


def units(number: int, source: Source) -> list[Unit]:
    """What a source holds, in the order of its paths; nothing for a folder that is empty.

    Raises:
      UserError: there is no such file, folder or dataset.
    """
    path = source.path
    if path == 'python-stdlib':
        return [Unit(number, path, 'stdlib', _TASK, mark=repr(stdlib.identity()))]
    if is_url(path):
        return _cut(number, source, _remote(source))
    start = pathlib.Path(path).expanduser()
    if start.is_dir():
        files = _there(walk(start))
        names = [(str(file), file.relative_to(start).as_posix()) for file in files]
        readable = [name for name, below in names if _readable(below, source.kind)]
        return _cut(number, source, [(name, *_stat(name)) for name in readable], str(start))
    if start.is_file():
        return _cut(number, source, [(str(start), *_stat(str(start)))])
    if glob.has_magic(path):
        files = _there(sorted(pathlib.Path(name) for name in glob.glob(str(start), recursive=True)))
        if files:
            return _cut(number, source, [(str(name), *_stat(str(name))) for name in files])
        raise UserError(
            f'{source.key}={path}: no file matches; expected a path, a glob, a folder, a URL or a dataset id'
        )
    if is_dataset_id(path) and start.suffix not in _FORMATS:
        datasets_hub.check(path, f'{source.key}={path}')
        return [Unit(number, path, 'hub', _TASK)]
    raise UserError(f'{source.key}={path}: no such file; expected a path, a glob, a folder, a URL or a dataset id')


def _there(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """Those that are files; of the rest pipes and links to nothing are named."""
    for path in paths:
        if path.is_symlink() and not path.exists():
            note_once(f'{path}: left out: a link that leads nowhere')
    return [path for path in paths if path.exists() and not path.is_dir() and is_regular(path)]


def _readable(path: str, kind: str) -> bool:
    if kind == 'code' and not path.endswith(('.jsonl', '.parquet', '.csv')):
        return sourcecode.wanted(path)
    form = format_of(path)
    if kind == 'web':  # beside pages lie their metadata, and notes
        return form in ('html', 'warc', 'jsonl', 'parquet', 'csv')
    return form == 'xml' if kind == 'wikipedia' and form in ('xml', 'html') else form not in ('', 'xml')


def _stat(name: str) -> tuple[int, str]:
    stat = pathlib.Path(name).stat()
    return stat.st_size, f'{stat.st_size} {stat.st_mtime_ns}'


def _remote(source: Source) -> list[tuple[str, int, str]]:
    import fsspec  # of the data extra

    try:
        system, path = fsspec.url_to_fs(source.path)
        listing = system.glob(path, detail=True) if glob.has_magic(path) else system.find(path, detail=True)
    except Exception as error:  # network, credentials, missing packages: each raises its own
        raise UserError(f'{source.key}={source.path}: cannot be listed: {" ".join(str(error).split())[:200]}') from None
    files = [(name, info) for name, info in sorted(listing.items()) if info.get('type') == 'file']
    named = len(files) == 1 and files[0][0] == path
    marks = ('ETag', 'etag', 'mtime', 'LastModified', 'created')
    return [
        (system.unstrip_protocol(name), info.get('size') or 0, str([str(info.get(mark)) for mark in marks]))
        for name, info in files
        if named or _readable(name, source.kind)
    ]


def format_of(path: str, default: str = '') -> str:
    """How a file is read, by its name without the ending of its compression."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return _FORMATS.get(pathlib.PurePosixPath(name).suffix, default)


def _cut(number: int, source: Source, files: list[tuple[str, int, str]], root: str = '') -> list[Unit]:
    parts = []
    for path, size, mark in files:
        form = format_of(path, 'text')
        if source.kind == 'code' and form in ('text', 'html', 'json', 'xml'):
            form = 'code'
        if form == 'jsonl' and size > _CUT and not path.lower().endswith(COMPRESSED):
            for start in range(0, size, _CUT):
                end = min(start + _CUT, size)
                parts.append(Unit(number, path, form, end - start, start, end, mark, root))
        else:
            parts.append(Unit(number, path, form, size, mark=mark, root=root))
    return parts


def tasks(parts: list[Unit]) -> list[list[Unit]]:
    """Units in order, gathered into tasks of about the same size; how many depends on the data alone."""
    wanted = max(_TASK, sum(unit.size for unit in parts) // _MOST_TASKS)
    gathered: list[list[Unit]] = []
    size = wanted
    for unit in parts:
        if size >= wanted or len(gathered[-1]) >= 5000:
            gathered.append([])
            size = 0
        gathered[-1].append(unit)
        size += unit.size + 512  # opening a small file costs something too
    return gathered


def identity(parts: list[Unit]) -> list[list[Any]]:
    """JSON values that change when the data does."""
    return [[unit.source, unit.path, unit.start, unit.end, unit.mark] for unit in parts]
