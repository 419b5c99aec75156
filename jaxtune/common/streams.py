"""Standard output and error that may be closed, full or gone: a run must not fail because nobody reads its output."""

import contextlib
import io
import os
import sys
from typing import TextIO


def open_all() -> None:
    """Opens standard streams that are closed, so that no other file gets their descriptors."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for name, descriptor in (('stdout', 1), ('stderr', 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, 'w', encoding='utf-8', closefd=False))


class Output:
    """The current `sys.stdout`, for writers that must not fail with it.

    Characters outside its encoding are escaped. Once it cannot be written any more, output is discarded, and a line
    on `sys.stderr` says so.
    """

    def _stream(self) -> TextIO | None:
        # While a bar is drawn, rich has put a stand-in there that writes through this.
        return getattr(sys.stdout, 'rich_proxied_file', sys.stdout)

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        stream = self._stream()
        if stream is None:
            return len(text)
        try:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or 'ascii'
                stream.write(text.encode(encoding, 'backslashreplace').decode(encoding))
        except (OSError, ValueError) as error:
            _give_up(stream, error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        stream = self._stream()
        if stream is None:
            return
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            _give_up(stream, error)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(AttributeError, ValueError):
            stream = self._stream()
            return stream is not None and stream.isatty()
        return False

    def fileno(self) -> int:
        """The descriptor of the stream.

        Raises:
          io.UnsupportedOperation: it has none.
        """
        if (stream := self._stream()) is None:
            raise io.UnsupportedOperation('fileno')
        return stream.fileno()

    @property
    def encoding(self) -> str:
        """How it encodes text."""
        return getattr(self._stream(), 'encoding', None) or 'utf-8'


def tell(line: str) -> None:
    """Writes a line to standard error, if that can be written."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


def _give_up(stream: TextIO, error: Exception) -> None:
    _silence(stream)
    tell(f'jaxtune: standard output: {getattr(error, "strerror", None) or error}; going on without it')


def _silence(stream: TextIO) -> None:
    """Puts the null device behind a stream, so that the end of the program, which flushes it, does not fail either."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # a stream without a number, or a closed one
        for name in ('stdout', 'stderr'):
            if getattr(sys, name) is stream:
                setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
