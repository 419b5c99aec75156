"""Files and folders that appear whole or not at all, whenever the process is killed."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxtune.errors import UserError, shown


@contextlib.contextmanager
def atomic_file(path: pathlib.Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its place when the block ends; not at all if the block raises.

    Args:
      path: in a folder that is there; a file of that name is replaced.
      sync: waits until the content is on the disk. Without, it may be lost with the power, not with the process: for
        what a later run can make again.

    Yields:
      The file, opened in binary mode under a temporary name in the same folder: `.NAME.` and eight characters.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(descriptor, 'wb') as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: pathlib.Path, text: str, *, sync: bool = True) -> None:
    """Writes a file whole or not at all; arguments as for `atomic_file`."""
    with atomic_file(path, sync=sync) as file:
        file.write(text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, indented, with a newline at its end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file, or None where there is none.

    Raises:
      UserError: the file is not JSON, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: expected JSON: {error}') from None


def read_mapping(path: pathlib.Path) -> dict[str, Any] | None:
    """The object that a JSON file holds, or None where there is none.

    Raises:
      UserError: the file is not JSON, holds another value, or cannot be read.
    """
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise UserError(f'{path}: expected a JSON object, found {shown(value)}')
    return value


def replace_folder(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves a folder to its place; one that is there goes first, and is removed afterwards.

    Args:
      new: complete, beside `folder` on the same file system.
      folder: its place. For a moment there may be nothing; the older one is then beside it as `.NAME.old`.
    """
    old = folder.with_name(f'.{folder.name}.old')
    try:
        os.rename(new, folder)
    except OSError:  # a rename cannot replace a folder that holds something
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
