"""Cleaning takes time linear in the text, however it is broken, and finds what the plain regular expressions find."""

import html
import re
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.prepare import books, clean, wikitext

_MARKUP = (
    '[[', '[[File:', '[[Image :', ']]', '[', ']', '{{', '}}', '{|', '|}', '|', '<ref', '<ref>', '</ref>', '/>', '>',
    '/', '<!--', '-->', '<math>', '</math>', '<gallery', '</gallery>', '__TOC__', '__', '\n', ' ', '=', '==', 'a',
    'b c', '[http://', '[//', 'x.org', "''", '*', '#', '&amp;', '<b>', '</b>', '\t',
)  # fmt: skip
_HTML = ('<!--', '-->', '<a ', '<b>', '>', '</p>', '<', '!--', '--', '-', ' ', '\t', '\n', '\xa0', 'x', 'a b', '\n\n')
_ADDRESSES = ('@', 'a', 'b1', '.', '..', '-', '!', 'é', 'x.org', '[1.2.3.4]', ' ', '_', 'z@y.co', '0', '[a:]', '[', ']')


def made_of(parts):
    return st.lists(st.sampled_from(parts), max_size=30).map(''.join)


def _wikitext(text):
    """The same in plain regular expressions, some of which take quadratic time."""
    note = r'<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|timeline)\b.*?</\1>|<!--.*?-->|__[A-Z]+__'
    text = re.sub(note, '', text, flags=re.DOTALL)
    for _ in range(20):
        text = re.sub(r'\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}', '', text, flags=re.DOTALL)
    text = re.sub(r'\[\[(?:File|Image)\s*:(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]', '', text, flags=re.I)
    text = re.sub(r'\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]', r'\1', text)
    text = re.sub(r'\[(?:https?:)?//\S+ ?([^\]]*)\]', r'\1', text)
    text = re.sub(r"'{2,}", '', text)
    text = re.sub(r'^=+ *(.*?) *=+ *$', r'\n\1\n', text, flags=re.MULTILINE)
    text = re.sub(r'^[*#:;]+ *', '- ', text, flags=re.MULTILINE)
    text = html.unescape(re.sub(r'</?\w+[^<>]*>', '', text))
    return re.sub(r'\n{3,}', '\n\n', text).strip()


@settings(max_examples=600, deadline=None)
@given(made_of(_MARKUP))
def test_wikitext(text):
    assert wikitext.prose(text) == _wikitext(text)


@settings(max_examples=400, deadline=None)
@given(made_of(_HTML))
def test_markup(text):
    expected = re.sub(r'<!--.*?-->|</?(?:a|b|p)(?:\s[^<>]{0,2000})?/?>', ' ', text, flags=re.I | re.DOTALL)
    expected = re.sub(r'[ \t\u00a0]+$', '', expected, flags=re.MULTILINE)
    assert clean.without_markup(text) == re.sub(r'\n{4,}', '\n\n\n', expected)


@settings(max_examples=400, deadline=None)
@given(made_of(_ADDRESSES))
def test_emails_are_those_of_datatrove(text):
    formatters = pytest.importorskip('datatrove.pipeline.formatters', reason='needs the extra [data]')
    assert clean._mask_emails(text) == formatters.PIIFormatter(email_replacement=clean.EMAIL).emails_replacer.replace(
        text
    )


_STEPS = {
    'wikitext': wikitext.prose,
    'markup': clean.without_markup,
    'pii': clean.mask_pii,
    'unicode': clean.plain_unicode,
    'encoding': clean.mend_encoding,
    'page': lambda text: books.page_text(f'<p>{text}</p>'.encode()),
}
# A part that begins something and does not end it, over and over.
_OPEN = (
    ' ', '\t', '<', '<a ', '<!--', '<ref', '<ref ', '<math>', '[[', '[[File:', '[[File:a [[a]] ', '[//', '[//a ', '{{',
    '{|', '=', '= ', '= a ', '__', '__A', "''", '- ', '&amp', '\n', ' \n', 'www.', '@', 'a.', 'a@', 'a.@', 'a-', '1.',
    '<b> </b>', 'Ã©', 'â€', '<table><tr>', 'aé',
)  # fmt: skip


@pytest.mark.parametrize('name', _STEPS)
def test_unended_parts(name):
    """300,000 characters of each; a step that is quadratic in any of them would take hours."""

    def too_long(signum, frame):
        raise TimeoutError(f'{name} is not linear in {part!r}')

    before = signal.signal(signal.SIGALRM, too_long)
    try:
        for part in _OPEN:
            signal.alarm(60)
            _STEPS[name](part * (300_000 // len(part)) + 'x')
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
