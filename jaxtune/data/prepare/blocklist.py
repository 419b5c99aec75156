"""Documents that hold a word of a list, or come from a domain of it, are dropped."""

import functools
import pathlib
import re

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step, words
from jaxtune.errors import UserError


@functools.cache
def blocklist(path: str) -> tuple[re.Pattern[str] | None, frozenset[str]]:
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


def blocked(document: Document, settings: Settings) -> str:
    """The text where neither it nor the host of its `url` is on the list.

    Raises:
      UserError: the list cannot be read.
    """
    pattern, domains = blocklist(settings.steps.filter.blocklist)
    host = re.match(r'\w+://(?:[^/@]*@)?([^/:?#]+)', document.metadata.get('url', ''))
    if host and domains:
        parts = host[1].lower().split('.')
        if any('.'.join(parts[i:]) in domains for i in range(len(parts))):
            return Dropped('blocked domain')
    if pattern is not None and pattern.search(document.text):
        return Dropped('blocked word')
    return document.text


STEP = Step(
    'blocklist',
    'words and domains of a list',
    blocked,
    on=lambda settings: bool(settings.steps.filter.blocklist),
)
