"""Web pages: bytes to characters, and the text of a page without what surrounds it (trafilatura, Barbaresi 2021)."""

import contextlib
import functools
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step

# A table with a cell as long as this holds the page's text, not figures.
_LAYOUT_CELL = 400
_DECLARED = re.compile(
    rb'<(?:meta[^>]{0,300}?charset|\?xml[^>]{0,100}?encoding)\s*=\s*["\']?\s*([\w-]+)', re.IGNORECASE
)
_MARKS = ((b'\xef\xbb\xbf', 'utf-8-sig'), (b'\xff\xfe', 'utf-16'), (b'\xfe\xff', 'utf-16'))
# What HTML's standard makes of these names (WHATWG Encoding).
_ALIASES = {'iso-8859-1': 'cp1252', 'latin1': 'cp1252', 'us-ascii': 'cp1252', 'gb2312': 'gb18030', 'gbk': 'gb18030'}
_BLOCKS = ('table', 'thead', 'tbody', 'tfoot', 'tr', 'td', 'th', 'caption')


class UndecodableError(ValueError):
    """Bytes are no text in any encoding that was declared or can be told."""


def decode(data: bytes, declared: str = '', html: bool = False) -> str:
    """Bytes as text: UTF-8, else the encoding that is declared, else the one that fits.

    Args:
      data: the file or page.
      declared: by the server.
      html: whether the page itself may declare one.

    Raises:
      UndecodableError: nothing fits.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            with contextlib.suppress(UnicodeDecodeError):
                return data.decode(name)
    with contextlib.suppress(UnicodeDecodeError):
        return data.decode('utf-8')
    names = [declared.lower()] if declared else []
    if html and (match := _DECLARED.search(data[:4096])):
        names.append(match[1].decode('ascii').lower())
    for name in names:
        if name.replace('_', '-') not in ('utf-8', 'utf8'):
            with contextlib.suppress(UnicodeDecodeError, LookupError):
                return data.decode(_ALIASES.get(name, name))
    return _guessed(data, names)


def _guessed(data: bytes, names: list[str]) -> str:
    from charset_normalizer import from_bytes  # of the data extra

    where = ''
    try:
        data.decode('utf-8')
    except UnicodeDecodeError as error:
        where = f'byte 0x{data[error.start]:02x} in line {data.count(10, 0, error.start) + 1}'
    if b'\0' not in data[:65536]:
        best = from_bytes(data[:65536]).best()
        if best is not None and best.encoding not in ('utf_8', 'ascii'):
            name = _ALIASES.get(best.encoding.replace('_', '-'), best.encoding)
            with contextlib.suppress(UnicodeDecodeError, LookupError):
                text = data.decode(name)
                if _natural(text):
                    return text
    raise UndecodableError(f'neither UTF-8 nor another encoding{" as declared" if names else ""}: {where}')


def _natural(text: str) -> bool:
    """Whether what is not ASCII are letters in words and the punctuation of prose, not noise."""
    others = re.findall(r'[^\x00-\x7f]', text)
    if not others or re.search('[\x00-\x08\x0e-\x1f\x80-\x9f]', text):
        return False
    good = len(re.findall(r'[^\W\d_](?<![\x00-\x7f])|[‘’“”–—…«»£§°·。，、：；！？（）《》「」·]', text))
    inside = len(re.findall(r'(?<=[^\W\d_])[^\x00-\x7f]|[^\x00-\x7f](?=[^\W\d_])|[‘’“”–—…«»£§°]', text))
    return good >= 0.95 * len(others) and inside >= 0.8 * len(others)


class TooSlowError(ValueError):
    """A page took longer than it is worth."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Ends what is inside after so many seconds; without a limit outside of a process's main thread.

    Raises:
      TooSlowError: the time is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise TooSlowError(f'extraction took longer than data.steps.extract.seconds={seconds:g}')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _trafilatura() -> tuple[Callable[..., str | None], Callable[[str], Any]]:
    import trafilatura  # of the data extra
    from trafilatura.utils import load_html  # of the data extra

    logging.getLogger('trafilatura').setLevel(logging.CRITICAL)  # pages without text are counted, not told

    return trafilatura.extract, load_html


def extract(page: str, favour: str = 'balance') -> str:
    """The text of a page; '' where it has none.

    Args:
      page: HTML.
      favour: `precision` (less, and surely the text), `recall` (more) or `balance`.
    """
    run, load = _trafilatura()
    tree = load(page)
    if tree is None and '<' in page:
        tree = load(f'<html><body>{page}</body></html>')  # a part of a page, as tools save it
    if tree is None:
        return ''
    _unwrap_layout(tree)
    text = run(
        tree,
        favor_precision=favour == 'precision',
        favor_recall=favour == 'recall',
        include_comments=False,
        include_tables=True,
        deduplicate=False,
    )
    return text or ''


def _unwrap_layout(tree: Any) -> None:
    """Tables that only place text become divisions, so that their text stays in paragraphs."""
    for table in list(tree.iter('table')):
        cells = [cell for cell in table.iter('td', 'th') if next(cell.iterancestors('table'), None) is table]
        longest = max((len(cell.text_content()) for cell in cells), default=0)
        if longest > _LAYOUT_CELL or len(cells) == 1:
            inner = [table, *(part for part in table.iter(*_BLOCKS) if part is not table)]
            for part in inner:
                if part is table or next(part.iterancestors('table', 'layout'), None) in (table, None):
                    part.tag = 'div'


def page_text(document: Document, settings: Settings) -> str:
    """The text of a page, within `data.steps.extract.seconds`."""
    steps = settings.steps.extract
    try:
        with limited(steps.seconds):
            text = extract(document.text, steps.favour)
    except TooSlowError as error:
        return Dropped(str(error))
    except (ValueError, RecursionError, AssertionError) as error:
        return Dropped(f'extraction fails: {type(error).__name__}')
    return text if text.strip() else Dropped('no text in the page')


STEP = Step('extract', 'text out of pages', page_text, applies=lambda document, settings: document.page)
