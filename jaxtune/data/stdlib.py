"""`python-stdlib`: the library of the running interpreter as documents, so that every machine has real text at hand."""

import functools
import importlib
import inspect
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

from jaxtune.errors import UserError

# Not prose or code that a person wrote for reading: tests, other people's packages, tables made by programs.
_SKIPPED_FOLDERS = {'__pycache__', 'dist-packages', 'ensurepip', 'idle_test', 'site-packages', 'test', 'tests'}
_SKIPPED_FILES = re.compile(r'(encodings/(cp|iso|mac_|koi|hp|kz|ptcp|tis)\w*|pydoc_data/topics|_sysconfigdata\w*)\.py')

# Modules in C: their documentation is in no source file. Only such as are safe to import anywhere.
_IN_C = ('_bisect', '_csv', '_datetime', '_decimal', '_heapq', '_json', '_pickle', '_random', '_socket', '_struct')
_IN_C += ('array', 'builtins', 'cmath', 'itertools', 'math', 'mmap', 'select', 'time', 'unicodedata', 'zlib')
_IN_C += ('_collections', '_functools', '_io', '_operator', '_sqlite3', '_thread', '_weakref', 'gc', 'marshal', 'posix')


def identity() -> list:
    """What distinguishes one interpreter's library from another's."""
    return ['python-stdlib', sys.version, sum(file.stat().st_size for file in _files())]


def documents() -> Iterator[str]:
    """Modules in the order of their paths, then the language reference's topics, then docstrings of modules in C.

    Raises:
      UserError: this interpreter came without the sources of its library.
    """
    files = _files()
    if not files:
        raise UserError(f'python-stdlib: no sources in {_root()}; expected an interpreter that came with its library')
    for file in files:
        try:
            yield file.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue  # a few modules are in another encoding on purpose
    yield from _topics()
    for name in sorted(_IN_C):
        text = _docstrings(name)
        if text:
            yield text


def sources() -> tuple[pathlib.Path, ...]:
    """The modules written in Python, in the order of their paths."""
    return _files()


def name_of(file: pathlib.Path) -> str:
    """A module's path within the library."""
    return file.relative_to(_root()).as_posix()


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path('stdlib'))


@functools.cache
def _files() -> tuple[pathlib.Path, ...]:
    root = _root()
    paths = []
    for file in root.rglob('*.py'):
        path = file.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(path.parts[:-1]) and not _SKIPPED_FILES.fullmatch(path.as_posix()):
            paths.append(path)
    return tuple(root / path for path in sorted(paths, key=lambda path: path.as_posix()))


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics  # slow to import
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


def _docstrings(name: str) -> str:
    """Names, signatures and docstrings of a module in C, one after the other."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return ''
    parts = [f'{name}\n\n{inspect.getdoc(module) or ""}']
    for path, member in _members(module, name):
        text = getattr(member, '__doc__', None)
        if isinstance(text, str) and text.strip():
            signature = getattr(member, '__text_signature__', None) or ''
            parts.append(f'{path}{signature if isinstance(signature, str) else ""}\n\n{inspect.cleandoc(text)}')
    return '\n\n'.join(parts) + '\n'


def _members(module: Any, name: str) -> Iterator[tuple[str, Any]]:
    for member_name, member in sorted(vars(module).items()):
        # Constants say nothing of their own, and what is written in Python was put there by somebody else.
        if member_name.startswith('_') or not (inspect.isclass(member) or inspect.isbuiltin(member)):
            continue
        yield f'{name}.{member_name}', member
        if inspect.isclass(member) and getattr(member, '__module__', name) in (name, name.lstrip('_'), 'builtins'):
            for own_name, own in sorted(vars(member).items()):
                if not own_name.startswith('_'):
                    yield f'{name}.{member_name}.{own_name}', own


def modules() -> Iterator[tuple[str, str]]:
    """`(dotted name, source)` of the modules written in Python, in the order of their paths."""
    for file in _files():
        name = file.relative_to(_root()).with_suffix('').as_posix().replace('/', '.').removesuffix('.__init__')
        if any(part.startswith('_') for part in name.split('.')):
            continue
        try:
            yield name, file.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
