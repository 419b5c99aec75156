"""Quality rules in presets by kind: which of them suit web pages, books, source code and Chinese.

The web's are Gopher's (Rae et al. 2021, table A1), C4's (Raffel et al. 2020) and FineWeb's (Penedo et al. 2024). Code's
follow Chen et al. 2021 and StarCoder (Li et al. 2023). Chinese has no spaces, other stop words and other punctuation,
so none of the rules that count words by spaces or lines by full stops run on it.
"""

from collections.abc import Callable
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped

UNSPACED_LANGUAGES = ('zh', 'ja')


def preset(document: Document, settings: Settings) -> str:
    """Whose rules a document goes through: `none`, `web`, `books`, `code` or `zh`.

    Its source's own preset counts before the recipe's; `auto` goes by the kind that its file turned out to be. Prose in
    an unspaced language gets the rules of `zh`, and records get none.
    """
    if document.kind == 'records':
        return 'none'
    chosen = document.source.preset or settings.steps.filter.preset
    if chosen == 'auto':
        by_kind = {'code': 'code', 'books': 'books', 'wikipedia': 'books', 'text': 'books'}
        chosen = by_kind.get(document.kind, 'web')
    prose = chosen not in ('none', 'code', 'zh')
    return 'zh' if prose and document.metadata.get('language', '') in UNSPACED_LANGUAGES else chosen


def of_preset(*names: str) -> Callable[[Document, Settings], bool]:
    """Whether a document goes through the rules of one of these presets."""
    return lambda document, settings: preset(document, settings) in names


def by_datatrove(rule: Any, text: str) -> str:
    """What one of datatrove's filters leaves of a text."""
    from datatrove.data import Document as DatatroveDocument  # of the data extra

    if not text.strip():
        return Dropped('empty')
    document = DatatroveDocument(text, '')
    verdict = rule.filter(document)
    kept, reason = verdict if isinstance(verdict, tuple) else (verdict, rule.name)
    return document.text if kept else Dropped(reason.replace('_', ' '))
