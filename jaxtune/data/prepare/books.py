"""Books: the chapters of an EPUB in reading order as one text, and the articles of a Wikipedia dump."""

import io
import posixpath
import re
import urllib.parse
import zipfile
from collections.abc import Iterator
from io import BufferedIOBase

from jaxtune.data.prepare import wikitext

_CONTAINER = 'META-INF/container.xml'


class DamagedError(ValueError):
    """A file is not what its name says."""


def epub(data: bytes, limit: int) -> str:
    """The text of an EPUB (a zip of XHTML pages in the order of its spine).

    Args:
      data: the file.
      limit: bytes of text at most; what a zip claims of its sizes is not believed.

    Raises:
      DamagedError: no EPUB, or larger than the limit.
    """
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]: compiled, without types

    try:
        book = zipfile.ZipFile(io.BytesIO(data))
        left = limit

        def member(name: str) -> bytes:
            nonlocal left
            with book.open(name) as file:
                content = file.read(left + 1)
            left -= len(content)
            if left < 0:
                raise DamagedError(f'unpacks to more than data.steps.limits.document_bytes={limit}')
            return content

        parser = etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
        root = etree.fromstring(member(_CONTAINER), parser)
        package = root.xpath('string(//*[local-name()="rootfile"]/@full-path)')
        opf = etree.fromstring(member(package), parser)
        hrefs = {item.get('id'): item.get('href') for item in opf.xpath('//*[local-name()="manifest"]/*')}
        chapters = []
        for reference in opf.xpath('//*[local-name()="spine"]/*/@idref'):
            if href := hrefs.get(reference):
                name = posixpath.normpath(posixpath.join(posixpath.dirname(package), urllib.parse.unquote(href)))
                chapters.append(page_text(member(name)))
    except (zipfile.BadZipFile, KeyError, etree.LxmlError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DamagedError(f'no EPUB: {error}') from None
    return '\n\n'.join(filter(None, chapters))


_BREAK = {'p', 'div', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'li', 'blockquote', 'pre', 'tr', 'section', 'hr', 'dt', 'dd'}


def page_text(page: bytes) -> str:
    """All text of an XHTML page, paragraphs apart."""
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]: compiled, without types
    from lxml import html as pages  # of the data extra

    if not page.strip():
        return ''
    tree = pages.fromstring(page, parser=pages.HTMLParser(encoding='utf-8'))
    for element in tree.xpath('//script|//style|//head|//nav'):
        element.drop_tree()
    parts: list[str] = []
    for event, element in etree.iterwalk(tree, ('start', 'end', 'comment', 'pi')):
        named = isinstance(element.tag, str)
        if named and element.tag in _BREAK:
            parts.append('\n\n')
        elif named and element.tag == 'br' and event == 'start':
            parts.append('\n')
        if event == 'start' and named and element.text:
            parts.append(re.sub(r'\s+', ' ', element.text))
        if event != 'start' and element.tail:
            parts.append(re.sub(r'\s+', ' ', element.tail))
    lines = re.sub(r'\n{2,} *\n*', '\n\n', ''.join(parts)).split('\n')
    return '\n'.join(line.strip(' ') for line in lines).strip()


class _Bounded:
    """A stream that gives so many bytes between two pages at most."""

    def __init__(self, stream: BufferedIOBase, limit: int) -> None:
        self.stream, self.limit, self.given = stream, limit, 0

    def read(self, size: int = -1) -> bytes:
        if self.given > self.limit:
            raise DamagedError(f'a page of more than data.steps.limits.document_bytes={self.limit}')
        data = self.stream.read(size)
        self.given += len(data)
        return data


def wikipedia(stream: BufferedIOBase, limit: int) -> Iterator[tuple[str, str]]:
    """`(title, text)` of the articles in a MediaWiki XML dump, read as a stream.

    Args:
      stream: its bytes.
      limit: bytes of a page at most.

    Raises:
      DamagedError: it breaks off, or is no XML.
    """
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]: compiled, without types

    title, bounded = '', _Bounded(stream, limit)
    try:
        for _, element in etree.iterparse(bounded, events=('end',), resolve_entities=False, huge_tree=True):
            name = etree.QName(element).localname
            if name == 'title':
                title = element.text or ''
            elif name == 'page':
                bounded.given = 0
                fields = {etree.QName(part).localname: part for part in element.iter() if isinstance(part.tag, str)}
                space = fields.get('ns')
                if 'redirect' not in fields and (space is None or space.text == '0') and 'text' in fields:
                    yield title, f'{title}\n\n{wikitext.prose(fields["text"].text or "")}'
                element.clear()
                while element.getprevious() is not None:
                    del element.getparent()[0]
    except etree.XMLSyntaxError as error:
        raise DamagedError(f'no MediaWiki dump: {error}') from None
