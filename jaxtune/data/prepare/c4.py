"""The rules of C4 for web pages (Raffel et al. 2020), as datatrove has them."""

import functools
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Step, quality, words


@functools.cache
def _filter() -> Any:
    from datatrove.pipeline import filters  # of the data extra

    return filters.C4QualityFilter(language=words.splitter(), filter_no_terminal_punct=False)


def c4(document: Document, settings: Settings) -> str:
    """The text without lines that are no prose; dropped where it holds a placeholder, scripts or code."""
    return quality.by_datatrove(_filter(), document.text)


STEP = Step('c4', 'placeholders, scripts and code in pages', c4, applies=quality.of_preset('web'))
