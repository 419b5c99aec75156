"""The rules of FineWeb for web pages (Penedo et al. 2024), as datatrove has them."""

import functools
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Step, quality, words


@functools.cache
def _filter() -> Any:
    from datatrove.pipeline import filters  # of the data extra

    return filters.FineWebQualityFilter(language=words.splitter())


def fineweb(document: Document, settings: Settings) -> str:
    """The text where its lines end as prose does, are no list, and are not repeated."""
    return quality.by_datatrove(_filter(), document.text)


STEP = Step('fineweb', 'lines that end, lists, lines said again', fineweb, applies=quality.of_preset('web'))
