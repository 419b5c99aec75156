"""Documents that are empty, too short or too long are dropped."""

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step


def by_length(document: Document, settings: Settings) -> str:
    """The text where its number of characters is within `data.min_chars` and `data.steps.filter.max_chars`."""
    text, least, most = document.text, settings.min_chars, settings.steps.filter.max_chars
    if not text.strip():
        return Dropped('empty')
    if len(text) < least:
        return Dropped(f'under {least:,} characters')
    if most and len(text) > most:
        return Dropped(f'over {most:,} characters')
    return text


STEP = Step('length', 'empty, short and long ones', by_length)
