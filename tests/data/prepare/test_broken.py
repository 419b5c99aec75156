"""Broken inputs are named, set aside and counted; the rest goes on; too many of them end the run."""

import gzip
import io
import json
import zipfile

import pyarrow
import pytest
from pyarrow import parquet
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from jaxtune.errors import UserError

from .corpus import prose

LIMIT = 200_000


@pytest.fixture
def corpus(tmp_path):
    """Good documents between all kinds of broken ones."""
    root = tmp_path / 'corpus'
    root.mkdir()
    rows = [json.dumps({'text': prose(80, i)}).encode() + b'\n' for i in range(12)]
    (root / 'good.jsonl').write_bytes(b''.join(rows[:4]))
    packed = gzip.compress(b''.join(rows[4:]))
    (root / 'corrupt.jsonl.gz').write_bytes(packed[: len(packed) // 2] + b'\0' * 40 + packed[len(packed) // 2 + 40 :])
    (root / 'cut.jsonl.gz').write_bytes(gzip.compress(rows[4]) + gzip.compress(b''.join(rows[5:]))[:-200])
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({'text': [prose(80, 20)]}), table)
    (root / 'whole.parquet').write_bytes(table.getvalue())
    (root / 'truncated.parquet').write_bytes(table.getvalue()[:-100])
    line = b'{"text": "' + b'x' * (3 * LIMIT) + b'"}\n'
    (root / 'long_line.jsonl').write_bytes(
        b'{"text": "before the long line"}\n' + line + b'{"text": "after the long line"}\n'
    )
    (root / 'invalid.jsonl').write_bytes(
        b'{"text": "a good line"}\n{"text": "bad \xff\xfe\xfa"}\n{"text": "the next"}\n'
    )
    (root / 'invalid.txt').write_bytes(b'words \xff\xfe\x81\x00 words')
    (root / 'latin.txt').write_bytes(
        'Le garçon a mangé la pêche près de la forêt, où il était né à Noël.'.encode('latin-1')
    )
    (root / 'wrong.jsonl').write_text('{"txt": "no text"}\n[1, 2]\nnot JSON\n{"text": 7}\n')
    (root / 'empty.jsonl').write_text('')
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as book:
        book.writestr('META-INF/container.xml', '<container><rootfile full-path="o.opf"/></container>')
        book.writestr('o.opf', '<p><manifest><item id="a" href="a.xhtml"/></manifest><spine><i idref="a"/></spine></p>')
        book.writestr('a.xhtml', '<p>' + 'x' * (5 * LIMIT) + '</p>')
    (root / 'bomb.epub').write_bytes(bomb.getvalue())
    (root / 'bomb.html.gz').write_bytes(gzip.compress(b'<p>' + b'y' * (5 * LIMIT)))
    (root / 'no_zip.epub').write_bytes(b'PK but no zip')
    with (root / 'pages.warc.gz').open('wb') as file:
        writer = WARCWriter(file, gzip=True)
        for i, body in enumerate(
            (
                b'<html><body><p>' + prose(200, 30).encode(),
                b'z' * (4 * LIMIT),
                b'<html><body><p>' + prose(200, 31).encode(),
            )
        ):
            headers = StatusAndHeaders(
                '200 OK', [('Content-Type', 'text/html'), ('Content-Encoding', 'gzip')], 'HTTP/1.1'
            )
            payload = io.BytesIO(gzip.compress(body))
            writer.write_record(
                writer.create_warc_record(f'http://x.org/{i}', 'response', payload, http_headers=headers)
            )
    pages = (root / 'pages.warc.gz').read_bytes()
    (root / 'torn.warc.gz').write_bytes(pages[: len(pages) - 60])
    (tmp_path / 'nothing').mkdir()
    return root


EXPECTED = {
    'bomb.epub': 'unpacks to more than data.steps.limits.document_bytes=200000',
    'bomb.html.gz': 'more than data.steps.limits.document_bytes=200000',
    'corrupt.jsonl.gz': '',
    'cut.jsonl.gz': 'Compressed file ended before the end-of-stream marker was reached',
    'invalid.jsonl:2': 'no JSON object in UTF-8',
    'invalid.txt': 'neither UTF-8 nor another encoding: byte 0xff in line 1',
    'long_line.jsonl:2': 'a line of 600,013 bytes',
    'no_zip.epub': 'no EPUB',
    'pages.warc.gz: record 2 http://x.org/1': 'more than data.steps.limits.document_bytes=200000',
    'torn.warc.gz: record 2 http://x.org/1': 'more than',
    'truncated.parquet': 'Parquet',
    'wrong.jsonl:1': "expected a text in 'text' (data.text_key); found 'txt'",
    'wrong.jsonl:2': 'found list',
    'wrong.jsonl:3': 'no JSON object',
    'wrong.jsonl:4': "found 'text'",
    'nothing': 'holds no data that can be read',
}


def test_broken_inputs(corpus, prepared, tmp_path, capsys):
    sources = {'all': {'path': str(corpus), 'kind': 'auto'}, 'nothing': {'path': str(tmp_path / 'nothing')}}
    changes = {'data.sources': sources, 'data.steps.limits.document_bytes': LIMIT}
    result = prepared('a', {**changes, 'data.eval_fraction': 0.0})
    broken = [json.loads(line) for line in (tmp_path / 'a' / 'set_aside.jsonl').read_text().splitlines()]
    reasons = {row['place'].removeprefix(f'{corpus}/').removeprefix(f'{tmp_path}/'): row['reason'] for row in broken}
    torn = [name for name in reasons if name.startswith('torn.warc.gz') and name not in EXPECTED]
    assert reasons.keys() - set(torn) == EXPECTED.keys()
    for place, words in EXPECTED.items():
        assert words in reasons[place], place
    assert result['metrics']['data/set_aside'] == len(broken)
    said = capsys.readouterr().out
    assert 'set aside: ' in said
    assert 'nothing' in said

    # Nothing that could be read is lost: neither before nor after what is broken.
    from jaxtune.data import tokenizer as tokenizers
    from jaxtune.data.tokens import Tokens

    tokens, tokenizer = Tokens.open(tmp_path / 'a' / 'train'), tokenizers.load(str(tmp_path / 'a' / 'tokenizer'))
    texts = {tokenizer.decode(tokens.document(i)[:-1]) for i in range(tokens.documents)}
    wanted = {prose(80, i) for i in range(5)} | {prose(80, 20), 'before the long line', 'after the long line'}
    wanted |= {'a good line', 'the next', 'Le garçon a mangé la pêche près de la forêt, où il était né à Noël.'}
    assert wanted <= texts
    assert any(text.startswith(prose(200, 31)[:60]) for text in texts)

    with pytest.raises(UserError, match=r'broken files and records in all, more than data\.steps\.limits\.broken=3'):
        prepared('b', {**changes, 'data.steps.limits.broken': 3})
    with pytest.raises(UserError, match='no source holds data'):
        prepared('c', {'data.sources': {'nothing': {'path': str(tmp_path / 'nothing')}}})
