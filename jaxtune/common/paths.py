"""Paths of the user: `~`, and paths that no system call accepts."""

import errno
import os
import pathlib

from jaxtune.errors import UserError, shown

# A path that does not exist may be a hub id, a glob or a function; its reader decides.
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """A path of this machine with `~` expanded; it need not exist.

    Args:
      path: as the user wrote it.
      name: the key or the file that it comes from, for the message.

    Raises:
      UserError: no system call accepts it: no such user, a name that is too long, NUL, a loop of links.
    """
    if problem := wrong(path):
        raise UserError(f'{name}={shown(os.fspath(path))}: expected {problem}')
    return pathlib.Path(path).expanduser()


def wrong(path: str | os.PathLike) -> str:
    """What was expected of a path, '' if it is fine."""
    try:
        os.fspath(path).encode()
        os.stat(pathlib.Path(path).expanduser())
    except RuntimeError:
        return "a path; no user's home folder is found for its ~"
    except UnicodeEncodeError:
        return 'a path in UTF-8'
    except ValueError:
        return 'a path without NUL characters'
    except OSError as error:
        if error.errno not in _ABSENT:
            return f'a path that can be opened: {error.strerror}'
    return ''
