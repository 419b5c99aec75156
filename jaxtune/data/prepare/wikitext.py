"""The prose of an article in MediaWiki's markup. Every step takes time linear in the text, however it is broken."""

import html
import re
from collections.abc import Iterator

_INNERMOST = re.compile(r'\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}', re.DOTALL)
_NOTE = re.compile(r'<ref|<(math|gallery|timeline)\b|<!--|__[A-Z]+__')
_FILE = re.compile(r'\[\[(?:File|Image|Category|Datei|Bild|Kategorie|Fichier|文件|分类)\s*:', re.IGNORECASE)
_OUTWARD = re.compile(r'\[(?:https?:)?//')
_BRACKET, _TAG_END, _SPACE = re.compile(r'[\[\]]'), re.compile('[>/]'), re.compile(r'\s')


def prose(text: str) -> str:
    """The prose: no templates, tables, files, notes; headings and links as plain text."""
    text = _without(text, _notes(text))
    for _ in range(20):
        text, count = _INNERMOST.subn('', text)
        if not count:
            break
    text = _without(text, _files(text))
    text = re.sub(r'\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]', r'\1', text)
    text = _without(text, _outward_links(text))
    text = re.sub(r"'{2,}", '', text)
    text = '\n'.join(map(_heading, text.split('\n')))
    text = re.sub(r'^[*#:;]+ *', '- ', text, flags=re.MULTILINE)
    text = html.unescape(re.sub(r'</?\w[^<>]*>', '', text))
    return re.sub(r'\n{3,}', '\n\n', text).strip()


def _without(text: str, spans: Iterator[tuple[int, int]]) -> str:
    """A text without spans of it, which come in order."""
    parts, at = [], 0
    for start, end in spans:
        parts.append(text[at:start])
        at = end
    return ''.join([*parts, text[at:]])


class _Ahead:
    """Looks for things at places that only move on: no stretch of the text is read twice for the same thing."""

    def __init__(self, text: str) -> None:
        self.text, self.seen = text, {}

    def find(self, part: str | re.Pattern, start: int) -> int:
        """Where the next one begins, at `start` or after it; -1 if nowhere."""
        at = self.seen.get(part, -2)
        if at == -2 or 0 <= at < start:
            if isinstance(part, str):
                at = self.text.find(part, start)
            else:
                match = part.search(self.text, start)
                at = match.start() if match else -1
            self.seen[part] = at
        return at


def _notes(text: str) -> Iterator[tuple[int, int]]:
    """References, formulas, galleries, comments and magic words, from their openings to their ends."""
    ahead, at = _Ahead(text), 0
    while match := _NOTE.search(text, at):
        opening, after = match[0], match.end()
        end = after
        if not opening.startswith('__'):
            closing = {'<ref': '</ref>', '<!--': '-->'}.get(opening, f'</{match[1]}>')
            stop = ahead.find(_TAG_END, after) if opening == '<ref' else -1
            if stop >= 0 and text.startswith('/>', stop):
                end = stop + 2
            else:
                close = ahead.find(closing, after)
                end = close + len(closing) if close >= 0 else -1
        if end < 0:
            at = match.start() + 1
            continue
        yield match.start(), end
        at = end


def _files(text: str) -> Iterator[tuple[int, int]]:
    """`[[File:…]]` and its like with the links inside their captions."""
    starts = list(_FILE.finditer(text))
    if not starts:
        return
    places = [match.start() for match in _BRACKET.finditer(text)]
    numbers = {place: number for number, place in enumerate(places)}
    closing = [len(places)] * (len(places) + 1)  # number of the first `]` at or after a bracket
    for number in reversed(range(len(places))):
        closing[number] = number if text[places[number]] == ']' else closing[number + 1]
    ends: dict[int, int] = {}  # number of a bracket in a caption -> where that caption ends, -1 if nowhere

    def end_of(number: int) -> int:
        passed, end = [], -1
        while number < len(places):
            if number in ends:
                end = ends[number]
                break
            passed.append(number)
            place = places[number]
            if text[place] == ']':
                end = place + 2 if text.startswith(']]', place) else -1
                break
            close = closing[number]
            if not text.startswith('[[', place) or close == len(places) or not text.startswith(']]', places[close]):
                break
            number = close + 2
        ends.update(dict.fromkeys(passed, end))
        return end

    at = 0
    for start in starts:
        # The brackets after the two that open it.
        if start.start() >= at and (end := end_of(numbers[start.start()] + 2)) >= 0:
            yield start.start(), end
            at = end


def _outward_links(text: str) -> Iterator[tuple[int, int]]:
    """What goes of links to other sites, `[https://… their text]`: the address with its brackets, not their text."""
    ahead, at, last = _Ahead(text), 0, text.rfind(']')
    while match := _OUTWARD.search(text, at):
        start, first = match.start(), match.end()
        stop = ahead.find(_SPACE, first)
        stop = len(text) if stop < 0 else stop
        after = stop + text.startswith(' ', stop)
        close = ahead.find(']', after)
        if stop == first or (close < 0 and last <= first):
            at = start + 1
            continue
        if close >= 0:
            yield start, after
            yield close, close + 1
            at = close + 1
        else:  # it ends in the address itself
            yield start, last + 1
            at = last + 1


def _heading(line: str) -> str:
    """`== A heading ==` apart from what surrounds it, without its signs; any other line as it is."""
    if not line.startswith('='):
        return line
    whole = line.rstrip(' ')
    if not whole.endswith('='):
        return line
    rest = whole.lstrip('=')
    if not rest:
        return '\n\n' if len(whole) > 1 else line
    return f'\n{rest.lstrip(" ").rstrip("=").rstrip(" ")}\n'
