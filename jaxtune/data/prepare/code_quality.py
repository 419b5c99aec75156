"""Rules for source code, after Chen et al. 2021 and StarCoder (Li et al. 2023)."""

import re

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step, quality

_GENERATED = re.compile(
    r'(?i)\b(?:auto-?generated|automatically generated|generated (?:by|from|code)|do not edit|machine generated)\b'
)


def code(document: Document, settings: Settings) -> str:
    """Source code that somebody wrote: neither minified, nor generated, nor mostly data."""
    text = document.text
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


STEP = Step('code', 'minified, generated, mostly data', code, applies=quality.of_preset('code'))
