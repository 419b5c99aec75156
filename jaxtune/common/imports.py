"""Functions and plug-ins of the user, imported by the names that a recipe gives."""

import contextlib
import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

from jaxtune.common import paths
from jaxtune.errors import UserError, blamed_on, reason, shown


def function(key: str, name: str) -> Callable:
    """The function that `module:function` or `file.py:function` names; see `import_from_string`.

    Raises:
      UserError: there is none, or its module fails when it is imported.
    """
    value = import_from_string(key, name)
    if not callable(value):
        raise UserError(f'{key}={name}: expected a function, found {type(value).__name__}')
    return value


def import_from_string(key: str, name: str) -> Any:
    """The object that `module:name` or `file.py:name` names.

    A module is looked for in the current folder first, as Python's own `-m` would.

    Args:
      key: of the recipe, for the message.
      name: its value.

    Raises:
      UserError: there is none, or its module fails when it is imported.
    """
    where, _, attribute = name.rpartition(':')
    if not attribute.isidentifier() or not (where.endswith('.py') or re.fullmatch(r'[^\W\d]\w*(\.\w+)*', where)):
        raise UserError(f'{key}={shown(name)}: expected module:function or file.py:function')
    module = _from_file(key, name, where) if where.endswith('.py') else _by_name(key, name, where)
    try:
        value = getattr(module, attribute, None)
    except Exception as error:  # of a module's own __getattr__
        raise UserError(f'{key}={name}: {where} does not give {attribute!r}: {reason(error)}') from None
    if value is None:
        near = difflib.get_close_matches(attribute, [own for own in vars(module) if not own.startswith('_')], 1)
        hint = f' (nearest: {near[0]})' if near else ''
        raise UserError(f'{key}={name}: expected module:function; {where} has no {attribute!r}{hint}')
    return value


def _from_file(key: str, name: str, where: str) -> ModuleType:
    path = paths.local(where, key)
    if not path.is_file():
        raise UserError(f'{key}={name}: no such file; expected module:function or file.py:function')
    path = path.resolve()
    # A unique name, under which other processes can unpickle its objects: two files may have the same stem.
    module_name = f'{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}'
    if module_name in sys.modules:
        return sys.modules[module_name]
    module, execute = of_file(module_name, str(path))
    sys.modules[module_name] = module
    try:
        with _first_on_path(str(path.parent)), blamed_on(f'{key}={name}: the module fails', str(path)):
            execute()
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Reads the source: cached byte code looks current after a change within the same second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def of_file(name: str, path: str) -> tuple[ModuleType, Callable[[], None]]:
    """The module of a Python file, still empty, and a function that executes it. No byte code is written."""
    loader = _Source(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # with a loader there always is one
    module = importlib.util.module_from_spec(spec)
    return module, lambda: loader.exec_module(module)


def _by_name(key: str, name: str, where: str) -> ModuleType:
    folder = os.getcwd()
    own = os.path.join(folder, *where.split('.')) + '.py'
    with (
        _first_on_path(folder),
        blamed_on(f'{key}={name}: expected module:function', own if os.path.isfile(own) else ''),
    ):
        return importlib.import_module(where)


@contextlib.contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """Inside, modules of a folder take precedence over all others."""
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
