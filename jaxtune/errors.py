"""The one exception a person is meant to read, and how another's exception becomes one."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

_SHOWN = 200  # characters of a value, or of what another's code says, in a message


class UserError(Exception):
    """The recipe, the data or the model handed in is wrong.

    The message is one line that names the key or the `file:line` and says what was expected; `main` prints it to
    stderr without a traceback and exits with status 2.
    """


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut where it is long; where it has none (of 5,000 digits, say), its type."""
    try:
        text = repr(value)
    except Exception as error:  # another's __repr__ raises what it likes
        text = f'<{type(value).__name__}: {error}>'
    return _cut(text)


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = ' '.join(str(error).split())
    return _cut(f'{type(error).__name__}: {text}' if text else type(error).__name__)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}… ({len(text):,} characters)'


def out_of_memory(error: BaseException) -> str:
    """What to say where a program ended for lack of memory, of the host or of a device; '' where it ended otherwise."""
    seen = error
    while seen is not None:
        text = str(seen)
        refused = type(seen).__name__ in ('JaxRuntimeError', 'XlaRuntimeError') and 'RESOURCE_EXHAUSTED' in text
        if refused or isinstance(seen, MemoryError) or getattr(seen, 'errno', None) == errno.ENOMEM:
            return (
                f'out of memory ({reason(seen)}): expected smaller sizes (train.batch_size, eval.batch_size, '
                'generate.batch_size, data.seq_len, the model, the files), a larger mesh, or more memory'
            )
        seen = seen.__cause__ or seen.__context__
    return ''


def place(error: BaseException, path: str) -> str:
    """`file:line` of a file's own last frame in a traceback, or of its syntax error; else the file alone."""
    line, trace = getattr(error, 'lineno', None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f'{path}:{line}' if isinstance(line, int) else path


@contextlib.contextmanager
def blamed_on(what: str, file: str = '') -> Iterator[None]:
    """Around a person's own code: whatever it raises becomes one line, leaving the program with `sys.exit` too.

    Args:
      what: begins the message: the key and its value, or what fails.
      file: of that code, to name the line.

    Raises:
      UserError: the code raised something else than that or KeyboardInterrupt.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        where = f'{place(error, file)}: ' if file else ''
        raise UserError(f'{where}{what}: {reason(error)}') from None


@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
    """Around another's parser of what a person handed in: whatever it raises becomes one line.

    Some raise what is no `Exception`: a panic of the Rust code under `tokenizers` is a BaseException.

    Args:
      what: begins the message: the file, or the key and its value.

    Raises:
      UserError: the parser raised something else than that.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f'{what}: {reason(error)}') from None
