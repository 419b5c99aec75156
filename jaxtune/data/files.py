"""Finding data files: folders with what their links lead to, each file once; nothing that would never end."""

import functools
import os
import pathlib
import stat

from jaxtune.common import console
from jaxtune.errors import UserError


def walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """What lies below a folder that is no folder itself, in the order of its paths, without what is hidden.

    Links are followed, after all that lies there itself, and only to what was not met before: no loops, no file twice.

    Raises:
      UserError: a folder cannot be listed.
    """
    paths: list[pathlib.Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[pathlib.Path] = []
        for start in waiting:
            if _first(start, seen):
                _list(start, paths, links, seen)
        waiting = []
        for link in sorted(links):
            if link.is_dir():
                waiting.append(link)
            elif not link.exists() or _first(link, seen):  # one that leads nowhere is named by who reads it
                paths.append(link)
    return sorted(paths)


def _list(start: pathlib.Path, paths: list[pathlib.Path], links: list[pathlib.Path], seen: set) -> None:
    def refuse(error: OSError) -> None:
        raise UserError(f'{error.filename}: cannot be listed: {error.strerror}')

    for parent, folders, names in os.walk(start, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith('.')]
        names = [name for name in names if not name.startswith('.')]
        links += [path for name in (*folders, *names) if (path := pathlib.Path(parent, name)).is_symlink()]
        own = [name for name in folders if not pathlib.Path(parent, name).is_symlink()]
        folders[:] = [name for name in own if _first(pathlib.Path(parent, name), seen)]
        for path in (pathlib.Path(parent, name) for name in names):
            if not path.is_symlink():
                seen.add(_identity(path))
                paths.append(path)


def _first(path: pathlib.Path, seen: set[tuple[int, int]]) -> bool:
    """Whether what a path leads to is met for the first time."""
    identity = _identity(path)
    new = identity not in seen
    seen.add(identity)
    return new


def _identity(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def is_regular(path: pathlib.Path) -> bool:
    """Whether a path leads to a file that ends; what is there and does not, such as a pipe, is left out with a line.

    Raises:
      UserError: it is a link to nothing, or cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = 'a link that leads nowhere' if path.is_symlink() else 'cannot be read'
        raise UserError(f'{path}: {what}: {error.strerror}; expected a file') from None
    if not stat.S_ISREG(mode):
        note_once(f'{path}: left out: not a regular file')
    return stat.S_ISREG(mode)


@functools.lru_cache(maxsize=1024)
def note_once(text: str) -> None:
    """Says something about data once, however often it is opened."""
    console.note(text)
