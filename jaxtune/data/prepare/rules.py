"""Quality rules, in presets by kind: which of them suit web pages, books, source code and Chinese.

The web's are datatrove's: Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020) and FineWeb (Penedo et al. 2024).
Code's follow Chen et al. 2021 and StarCoder (Li et al. 2023). Chinese has no spaces, other stop words and other
punctuation, so none of the rules that count words by spaces or lines by full stops run on it.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping

from jaxtune.common import imports
from jaxtune.data.prepare import gopher, words
from jaxtune.errors import UserError, blamed_on

# Takes a text and its metadata; returns the text, maybe cut, or the reason why it goes.
Rule = Callable[[str, Mapping], 'str | Dropped']

UNSPACED_LANGUAGES = ('zh', 'ja')


class Dropped(str):
    """The reason why a document goes."""


def rules(preset: str, language: str) -> list[tuple[str, Rule]]:
    """`(name, rule)` of a preset; prose in an unspaced language gets those of `zh`."""
    if preset in ('web', 'books', 'text') and language in UNSPACED_LANGUAGES:
        preset = 'zh'
    return _presets(preset, language)


@functools.cache
def _presets(preset: str, language: str) -> list[tuple[str, Rule]]:
    if preset == 'none':
        return []
    if preset == 'code':
        return [('code', code)]
    if preset == 'zh':
        return [('zh', chinese)]
    from datatrove.pipeline import filters

    own = {'language': words.splitter()}
    # Gopher's stop words are English; in other languages that rule would drop everything.
    stop_words = 2 if language in ('', 'en') else None
    if preset == 'books':
        # Verse repeats lines, and dialogue is a quarter punctuation.
        repetition = gopher.Repetition(0.5, 0.5, 0.4, 0.4)
        quality = gopher.Quality(20, None, 0.6, stop_words)
        return [('gopher repetition', _said(repetition)), ('gopher quality', _said(quality))]
    page = filters.C4QualityFilter(**own, filter_no_terminal_punct=False)
    return [
        ('gopher repetition', _said(gopher.Repetition())),
        ('gopher quality', _said(gopher.Quality(stop_words=stop_words))),
        ('c4', functools.partial(_datatrove, page)),
        ('fineweb', functools.partial(_datatrove, filters.FineWebQualityFilter(**own))),
    ]


def _said(judge: Callable[[str], str]) -> Rule:
    """A rule out of a function that says why a text goes."""
    return lambda text, metadata: Dropped(why) if (why := judge(text)) else text


def _datatrove(rule, text: str, metadata: Mapping) -> str:
    from datatrove.data import Document

    if not text.strip():
        return Dropped('empty')
    document = Document(text, '')
    verdict = rule.filter(document)
    kept, reason = verdict if isinstance(verdict, tuple) else (verdict, rule.name)
    return document.text if kept else Dropped(reason.replace('_', ' '))


_GENERATED = re.compile(
    r'(?i)\b(?:auto-?generated|automatically generated|generated (?:by|from|code)|do not edit|machine generated)\b'
)


def code(text: str, metadata: Mapping) -> str:
    """Source code that a person wrote: neither minified, nor generated, nor mostly data."""
    lines = text.splitlines()
    if not any(map(str.strip, lines)):
        return Dropped('empty')
    if max(map(len, lines)) > 1000 and len(text) / len(lines) > 60:
        return Dropped('minified: a line of over 1000 characters')
    if len(text) / len(lines) > 100:
        return Dropped('lines of over 100 characters on average')
    if sum(map(str.isalnum, text)) < 0.25 * len(text):
        return Dropped('under a quarter letters and digits')
    if sum(map(str.isalpha, text)) < 0.15 * len(text):
        return Dropped('mostly numbers')
    if _GENERATED.search('\n'.join(lines[:8])):
        return Dropped('generated')
    return text


_HAN = re.compile(f'[{words.UNSPACED}]')
_LETTER = re.compile(r'[^\W\d_]')


def chinese(text: str, metadata: Mapping) -> str:
    """Chinese prose and verse: long enough, in Han characters, not one thing over and over."""
    letters, han = len(_LETTER.findall(text)), len(_HAN.findall(text))
    if han < 10:
        return Dropped('under 10 characters')
    if han < 0.4 * letters:
        return Dropped('mostly other scripts')
    if text.count('\ufffd') > 0.01 * len(text):
        return Dropped('undecodable')
    if letters < 0.4 * len(''.join(text.split())):
        return Dropped('mostly symbols')
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= 10 and len(set(lines)) < 0.5 * len(lines):
        return Dropped('lines repeated')
    if han >= 200:
        # Boilerplate says the same eight characters again and again, which verse does not.
        characters = _HAN.findall(text)
        grams = [''.join(characters[i : i + 8]) for i in range(len(characters) - 7)]
        if len(set(grams)) < 0.7 * len(grams):
            return Dropped('phrases repeated')
    return text


@functools.cache
def blocklist(path: str) -> tuple[re.Pattern | None, frozenset[str]]:
    """The words and phrases of a file as one pattern, and its domains.

    Raises:
      UserError: it cannot be read.
    """
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'data.steps.filter.blocklist={path}: cannot be read: {error}') from None
    entries = sorted({line.strip().lower() for line in lines if line.strip() and not line.startswith('#')})
    domains = frozenset(entry for entry in entries if re.fullmatch(r'[\w-]+(\.[\w-]+)+', entry))
    phrases = [
        re.escape(entry) if re.search(f'[{words.UNSPACED}]', entry) else rf'\b{re.escape(entry)}\b'
        for entry in entries
        if entry not in domains
    ]
    return (re.compile('|'.join(phrases), re.IGNORECASE) if phrases else None), domains


def blocked(text: str, metadata: Mapping, path: str) -> str:
    """Drops what holds a word of the list or comes from a domain of it."""
    pattern, domains = blocklist(path)
    found = re.match(r'\w+://(?:[^/@]*@)?([^/:?#]+)', metadata.get('url', ''))
    if found and domains:
        parts = found[1].lower().split('.')
        if any('.'.join(parts[i:]) in domains for i in range(len(parts))):
            return Dropped('blocked domain')
    if pattern is not None and pattern.search(text):
        return Dropped('blocked word')
    return text


@functools.cache
def custom(name: str) -> Callable[[str, Mapping], object]:
    """The function that `module:function` names.

    Raises:
      UserError: there is none.
    """
    return imports.function('data.steps.filter.custom', name)


def by_person(text: str, metadata: Mapping, name: str) -> str:
    """Applies a person's own rule: a text replaces the document's, False drops it, anything else keeps it."""
    function = custom(name)
    file = getattr(getattr(function, '__code__', None), 'co_filename', '')
    with blamed_on(f'data.steps.filter.custom={name}', file):
        verdict = function(text, metadata)
    if isinstance(verdict, str):
        return verdict
    return Dropped(name) if verdict is False or verdict is None else text
