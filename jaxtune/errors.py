"""`UserError`, the exception whose message the user reads, and context managers that turn others into it."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

_SHOWN = 200  # characters of a value, or of a foreign message, in a message


class UserError(Exception):
    """The recipe, the data or the model is wrong.

    The message is one line that names the key or the `file:line` and says what was expected; `main` prints it to
    stderr without a traceback and exits with status 2.
    """


class StepError(UserError):
    """What a step asked of the user's own code failed, before the step changed anything: the state can be saved."""


def shown(value: Any) -> str:
    """A value for a message: its `repr`, truncated; if that fails (an integer of 5,000 digits), its type."""
    try:
        text = repr(value)
    except Exception as error:  # a foreign __repr__ may raise anything
        text = f'<{type(value).__name__}: {error}>'
    return _cut(text)


def reason(error: BaseException) -> str:
    """The type and the message of an exception, on one line."""
    try:
        text = ' '.join(str(error).split())
    except Exception:  # a foreign __str__ may raise anything
        text = ''
    return _cut(f'{type(error).__name__}: {text}' if text else type(error).__name__)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}… ({len(text):,} characters)'


def out_of_memory(error: BaseException) -> str:
    """The message for an error that means out of memory, of the host or a device; '' for other errors."""
    seen = error
    while seen is not None:
        known = type(seen).__name__ in ('JaxRuntimeError', 'XlaRuntimeError')
        refused = known and 'RESOURCE_EXHAUSTED' in str(seen)
        if refused or isinstance(seen, MemoryError) or getattr(seen, 'errno', None) == errno.ENOMEM:
            return (
                f'out of memory ({reason(seen)}): expected smaller sizes (train.batch_size, eval.batch_size, '
                'generate.batch_size, data.seq_len, the model, the files), a larger mesh, or more memory'
            )
        seen = seen.__cause__ or seen.__context__
    return ''


def line_of(error: Exception) -> str:
    """The one line of an error that a person can mend: a `UserError`, or too little memory; '' for other errors."""
    return ' '.join(str(error).split()) if isinstance(error, UserError) else out_of_memory(error)


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
    """Around code of the user: any exception, `sys.exit` too, becomes a `UserError` of one line.

    Args:
      what: the start of the message: the key and its value, or what fails.
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
    """Around a third-party parser of user input: any exception becomes a `UserError` of one line.

    A panic of the Rust code under `tokenizers` is a BaseException, not an Exception.

    Args:
      what: the start of the message: the file, or the key and its value.

    Raises:
      UserError: the parser raised something else than that.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(f'{what}: {reason(error)}') from None
