"""Cleaning: what was text keeps its words; what a machine put between them goes."""

import functools
import html
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Step
from jaxtune.data.prepare.decontaminate import texts

_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufff9-\ufffb]')
# What UTF-8 read as a one-byte encoding looks like: one of the letters and signs that its first bytes become, and
# another that is not ASCII behind it.
_SUSPECT = re.compile('[\u0080-\u024f\u0400-\u04ff\u2010-\u2122\ufffd][^\x00-\x7f]')
_BLANK_LINES = re.compile(r'\n{4,}')
_LINE_ENDS = re.compile('\r\n?|\u2028|\u2029|\x85')
# Entities that were escaped twice, tags and comments that extraction left, lines that are nothing but an address.
_ENTITY = re.compile(r'&(?:#\d{1,6}|#x[0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});')
_TAG = (
    r'</?(?:a|abbr|b|big|blockquote|br|center|code|dd|div|dl|dt|em|font|h[1-6]|hr|i|img|li|ol|p|pre|s|'
    r'script|small|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|tr|tt|u|ul)(?:\s[^<>]{0,2000})?/?>'
)
_TAGS = re.compile(_TAG, re.IGNORECASE)
_TAGS_AND_COMMENTS = re.compile(f'<!--.*?-->|{_TAG}', re.IGNORECASE | re.DOTALL)
_URL_LINE = re.compile(r'^[ \t]*(?:[-*•·|>]+[ \t]*)?<?(?:https?://|ftp://|www\.)\S+>?[ \t]*(?:\n|\Z)', re.MULTILINE)
_GUTENBERG_START = re.compile(r'^.{0,9}\*\*\* ?START OF .{0,200}PROJECT GUTENBERG.*$\n?', re.IGNORECASE | re.MULTILINE)
_GUTENBERG_END = re.compile(
    r'^.{0,9}(?:\*\*\* ?END OF .{0,200}PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*\Z',
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)


def mend_encoding(text: str) -> str:
    """Undoes wrong decodings (`â€œ` for a quotation mark), line by line, with ftfy (Speer 2019)."""
    if text.isascii() or not _SUSPECT.search(text):
        return text
    fix, is_bad, config = _ftfy()
    return ''.join(
        fix(line, config) if not line.isascii() and _SUSPECT.search(line) and is_bad(line) else line
        for line in text.splitlines(keepends=True)
    )


@functools.cache
def _ftfy() -> tuple[Callable[..., str], Callable[[str], bool], Any]:
    import ftfy  # of the data extra

    # Only the encoding: quotation marks, ligatures and widths are the author's own.
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    from ftfy.badness import is_bad  # of the data extra

    return ftfy.fix_text, is_bad, config


def plain_unicode(text: str) -> str:
    r"""NFC, `\n` as the end of lines, and no control or invisible direction characters."""
    text = _LINE_ENDS.sub('\n', text)
    text = _CONTROL.sub('', text)
    return text if text.isascii() else unicodedata.normalize('NFC', text)


def without_markup(text: str) -> str:
    """No rests of HTML, no lines of bare addresses, no e-book licence around a book, no long stretches of blank."""
    if '&' in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if '<' in text:
        # Behind the last end of a comment none is looked for: each that is open would be read to the end of the text.
        cut = text.rfind('-->') + 3 if '-->' in text else 0
        text = _TAGS_AND_COMMENTS.sub(' ', text[:cut]) + _TAGS.sub(' ', text[cut:])
    if '://' in text or 'www.' in text:
        text = _URL_LINE.sub('', text)
    if 'utenberg' in text or 'UTENBERG' in text:
        text = without_licence(text)
    text = '\n'.join(line.rstrip(' \t\u00a0') for line in text.split('\n'))
    return _BLANK_LINES.sub('\n\n\n', text)


def without_licence(text: str) -> str:
    """The book between the marks that Project Gutenberg puts around it; all of it where there are none."""
    text = _GUTENBERG_END.sub('', text)
    start = _GUTENBERG_START.search(text)
    return text[start.end() :] if start else text


EMAIL, ADDRESS, TELEPHONE = 'email@example.com', '192.0.2.1', '555-0100'
_ADDRESS_HINT = re.compile(r'\d\.\d{1,3}\.\d{1,3}\.\d')
_TELEPHONE = re.compile(
    r'(?<![\w./+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,8}){1,4}'
    r'|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}|1[3-9]\d{9})(?![\w-]|\.\d)'
)


# An email address as datatrove's PIIFormatter finds it, around its `@`: looked for as a whole, a long run of letters
# and points without one would be read again from each of its points on.
_LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+/=?^_`{|}~-"
_LOCAL_START = re.compile(rf'\b[{re.escape(_LOCAL)}]')
_LABEL, _BYTE = '[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?', '(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)'
_DOMAIN = re.compile(rf'(?:{_LABEL}\.)+{_LABEL}|\[(?:{_BYTE}\.){{3}}(?:{_BYTE}|[A-Za-z0-9-]*[A-Za-z0-9]:)]')


@functools.cache
def _addresses() -> Any:
    from datatrove.pipeline.formatters import PIIFormatter  # of the data extra

    return PIIFormatter(ip_replacement=ADDRESS).ip_replacer


def _mask_emails(text: str) -> str:
    parts, done, before, at = [], 0, 0, text.find('@')
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        local = text[max(done, before) : at]
        local = local[len(local.rstrip(_LOCAL + '.')) :]
        if domain and local and not local.endswith('.'):
            first = at - len(local[local.rfind('..') + 2 if '..' in local else 0 :].lstrip('.'))
            if start := _LOCAL_START.search(text, first, at):
                parts += [text[done : start.start()], EMAIL]
                done = domain.end()
        before, at = at + 1, text.find('@', max(at + 1, done))
    return ''.join([*parts, text[done:]])


def mask_pii(text: str) -> str:
    """Email addresses, public IP addresses and telephone numbers become ones that belong to nobody."""
    text = _mask_emails(text)
    if _ADDRESS_HINT.search(text):
        text = _addresses().replace(text)
    return _TELEPHONE.sub(lambda match: TELEPHONE if 9 <= sum(map(str.isdigit, match[0])) <= 15 else match[0], text)


def cleaned(document: Document, settings: Settings) -> str:
    """The text after the kinds of cleaning that `data.steps.clean` asks for; of a record, each of its texts."""
    if document.record is None:
        return _clean(document.text, document.kind, settings.steps.clean)
    document.record = _each_text(document.record, lambda text: _clean(text, 'records', settings.steps.clean))
    return '\n'.join(texts(document.record))


def _clean(text: str, kind: str, asked: Settings) -> str:
    if asked.encoding:
        text = mend_encoding(text)
    if asked.unicode:
        text = plain_unicode(text)
    if asked.markup and kind not in ('code', 'records'):
        text = without_markup(text)
    if asked.pii:
        text = mask_pii(text)
    return text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_text(inner, change) for name, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, list) else value


def _on(settings: Settings) -> bool:
    asked = settings.steps.clean
    return bool(asked.encoding or asked.unicode or asked.markup or asked.pii)


STEP = Step('clean', 'encoding, Unicode, rests of markup, personal data', cleaned, on=_on)
