"""Output to the terminal: notes, facts, tables and progress bars, from process 0 only."""

import contextlib
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from jaxtune.common.streams import Output

WIDTH = 80
# Least time between two drawings of a bar, and between two lines of progress in a log.
_DRAW_SECONDS = 0.1
_LINE_SECONDS = 30.0
_CHATTY = (
    'absl', 'datasets', 'datatrove', 'etils', 'filelock', 'flax', 'fsspec', 'grain', 'httpx', 'huggingface_hub', 'jax',
    'multiprocess', 'orbax', 'peft', 'tensorboardX', 'tensorstore', 'torch', 'transformers', 'urllib3',
)  # fmt: skip

_primary = True
# It has what rich uses of a file.
_console = Console(file=cast(IO[str], Output()), highlight=False, emoji=False)
_shared: '_Shared | None' = None


def quiet_logs() -> None:
    """Silences the libraries below: their errors still reach the terminal, their warnings and logs do not.

    What the environment already says (`TRANSFORMERS_VERBOSITY=info`, `PYTHONWARNINGS=default`) is left as it is.
    """
    for name, value in {
        'TF_CPP_MIN_LOG_LEVEL': '2',
        'TPU_STDERR_LOG_LEVEL': '3',
        'TPU_MIN_LOG_LEVEL': '3',
        'GRPC_VERBOSITY': 'ERROR',
        'TRANSFORMERS_VERBOSITY': 'error',
        'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1',
        'DATASETS_VERBOSITY': 'error',
        'HF_DATASETS_DISABLE_PROGRESS_BARS': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1',
    }.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter('ignore')
    logging.getLogger().setLevel(logging.ERROR)
    from absl import logging as absl_logging  # slow to import

    # Orbax logs an error in each thread that meets it, with its traceback, before it raises it.
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold(absl_logging.FATAL)


def set_primary(primary: bool) -> None:
    """Sets whether this process prints and writes (process 0 of a pod)."""
    global _primary
    _primary = bool(primary)


def is_primary() -> bool:
    """Whether this process prints and writes."""
    return _primary


def note(text: str) -> None:
    """Prints one line, uncut; above live progress bars. Brackets have no special meaning."""
    if _primary:
        _console.print(Text(str(text)), soft_wrap=True)
        _console.file.flush()


def facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """Prints names and values in two columns; long values wrap, long words are not broken."""
    pairs = [(str(name), str(value)) for name, value in pairs if value not in (None, '')]
    if not (_primary and pairs):
        return
    indent = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        lines = [
            line
            for part in value.split('\n')
            for line in textwrap.wrap(part, WIDTH - indent, break_long_words=False, break_on_hyphens=False) or ['']
        ]
        text = Text(f'{name:<{indent}}', style='dim')
        text.append(f'\n{" " * indent}'.join(lines), style='not dim')
        _console.print(text, soft_wrap=True)
    _console.file.flush()


def table(rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in aligned columns, the first row as titles; numbers are right-aligned."""
    rows = [[f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    if not (_primary and rows):
        return
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell[:1] in ('-', '+') for cell in column[1:]) for column in columns]
    for i, row in enumerate(rows):
        cells = (
            f'{cell:>{width}}' if to_right else f'{cell:<{width}}'
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        _console.print(Text('  '.join(cells).rstrip(), style='' if i else 'dim'), soft_wrap=True)
    _console.file.flush()


def example(pieces: Iterable[tuple[str, bool]], title: str) -> None:
    """Prints a text in runs `(text, highlighted)`: in colour, or in brackets without colour."""
    if not _primary:
        return
    colours = _console.is_terminal and _console.color_system is not None and not _console.no_color
    text = Text(f'{title}\n', style='dim')
    for piece, out in pieces:
        shown = f'⟦{piece}⟧' if out and not colours else piece
        text.append(shown, style='not dim bold green' if out else 'dim')
    _console.print(text, soft_wrap=True)
    _console.file.flush()


def clock(seconds: float) -> str:
    """`0:07`, `12:07`, `3:12:07`."""
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Bar:
    """A count towards a total, as `progress` yields it; this base class shows nothing."""

    def __init__(self, total: int, title: str, unit: str, initial: int = 0) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.initial = self.done = initial
        self.fields: dict[str, Any] = {}
        self.began = time.monotonic()

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Counts `n` more; fields (`loss='2.345'`) are shown until they are given again."""
        self.done += n
        if fields:
            self.fields.update(fields)
        self._moved()

    def _moved(self) -> None:
        pass

    def close(self) -> None:
        """Shows the end."""

    @property
    def percent(self) -> int:
        """How far it is, in whole percent."""
        return int(100 * self.done / self.total) if self.total else 100

    def rate(self) -> str:
        """Units per second since the bar was opened, evaluations and saves included, for the time left."""
        elapsed, moved = time.monotonic() - self.began, self.done - self.initial
        if not moved or elapsed <= 0:
            return f'- {self.unit}/s'
        rate = moved / elapsed
        return f'{rate:,.{0 if rate >= 100 else 1}f} {self.unit}/s' if rate >= 1 else f'{1 / rate:.1f} s/{self.unit}'

    def times(self) -> str:
        """Elapsed and left: `2:30<3:05`."""
        elapsed, moved = time.monotonic() - self.began, self.done - self.initial
        left = clock(elapsed / moved * (self.total - self.done)) if moved else '-:--'
        return f'{clock(elapsed)}<{left}'

    def words(self) -> str:
        """The fields: `loss=2.345 tokens=1,234/s`."""
        return ' '.join(f'{name}={value}' for name, value in self.fields.items())


class _Lines(Bar):
    """Progress in a log: a line every tenth of the total, at most every half minute."""

    def __init__(self, total: int, title: str, unit: str, initial: int = 0, *, inner: bool) -> None:
        super().__init__(total, title, unit, initial)
        self._inner = inner
        self._said, self._said_at = self.done, self.began

    def _moved(self) -> None:
        if (self.done - self._said) * 10 >= self.total and time.monotonic() - self._said_at >= _LINE_SECONDS:
            self._say()

    def _say(self) -> None:
        self._said, self._said_at = self.done, time.monotonic()
        parts = [f'{self.title} {self.done:,}/{self.total:,} {self.percent}%', self.rate(), self.times(), self.words()]
        note('  '.join(part for part in parts if part))

    def close(self) -> None:
        # An inner bar of a few seconds needs no line.
        if self.done > self._said and (not self._inner or time.monotonic() - self.began >= _LINE_SECONDS):
            self._say()


class _Drawn(Bar):
    """A bar on a terminal."""

    def __init__(self, total: int, title: str, unit: str, initial: int = 0, *, live: '_Shared') -> None:
        super().__init__(total, title, unit, initial)
        self._live, self._drawn_at = live, 0.0
        self._task = live.progress.add_task(self.title, total=self.total, completed=self.done, bar=self)

    def _moved(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= _DRAW_SECONDS:
            self._drawn_at = now
            self._live.progress.update(self._task, completed=self.done)

    def close(self) -> None:
        progress = self._live.progress
        progress.update(self._task, completed=self.done)
        if self._live.depth > 1:
            progress.remove_task(self._task)
        else:
            progress.stop_task(self._task)


class _Column(ProgressColumn):
    """A column whose text is a function of the bar."""

    max_refresh = 0.25

    def __init__(self, text: Callable[[Bar], str], style: str = '') -> None:
        super().__init__()
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(task.fields['bar']), style=self._style, no_wrap=True, overflow='ellipsis')


class _Shared:
    """The one live display of a terminal; inner bars are further lines of it."""

    def __init__(self) -> None:
        self.depth = 0
        self.progress = Progress(
            _Column(lambda bar: bar.title),
            BarColumn(bar_width=max(6, min(40, _console.width - 74))),
            _Column(lambda bar: f'{bar.percent}%'),
            _Column(lambda bar: f'{bar.done}/{bar.total}'),
            _Column(Bar.rate, 'cyan'),
            _Column(Bar.times, 'dim'),
            _Column(Bar.words),
            console=_console,
            refresh_per_second=4,
        )


@contextlib.contextmanager
def progress(total: int, title: str, unit: str, initial: int = 0) -> Iterator[Bar]:
    """Shows progress: a bar on a terminal, occasional lines in a log, nothing on other processes.

    Args:
      total: the final count.
      title: of the bar (`train`).
      unit: of the count (`step`).
      initial: the count at the start (of a resumed run).

    Yields:
      A `Bar`. One opened inside another is drawn below it and removed when it is done.
    """
    global _shared
    if not _primary:
        yield Bar(total, title, unit, initial)
        return
    outermost = _shared is None
    live = _shared = _shared or _Shared()
    live.depth += 1
    terminal = _console.is_terminal and not _console.is_dumb_terminal
    if terminal and outermost:
        live.progress.start()
    bar = None
    try:
        if terminal:
            bar = _Drawn(total, title, unit, initial, live=live)
        else:
            bar = _Lines(total, title, unit, initial, inner=not outermost)
        yield bar
    finally:
        try:
            if bar is not None:
                bar.close()
        finally:
            live.depth -= 1
            if outermost:
                _shared = None
                if terminal:
                    live.progress.stop()
