"""Rules for Chinese prose and verse."""

import re

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step, quality, words

_HAN = re.compile(f'[{words.UNSPACED}]')
_LETTER = re.compile(r'[^\W\d_]')


def chinese(document: Document, settings: Settings) -> str:
    """The text where it is long enough, in Han characters, and not one thing over and over."""
    text = document.text
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


STEP = Step('zh', 'Chinese prose and verse', chinese, applies=quality.of_preset('zh'))
