"""What is read: each kind of source, through a whole run or from its reader."""

import io
import json
import zipfile

import pytest

from jaxtune.data.prepare import books, sources
from jaxtune.data.prepare import plan as plans
from jaxtune.data.prepare.readers import read
from jaxtune.data.records import open_records
from jaxtune.errors import UserError
from jaxtune.tasks import pipeline

from .corpus import prose


def documents(recipe, source, **changes):
    plan = plans.make(recipe({'data.sources': {'a': source}, **changes}).data, '')
    broken = []
    units = sources.units(0, plan.sources[0])
    found = [document for unit in units for document in read(unit, plan, lambda *row: broken.append(row))]
    assert broken == []
    return found


def epub(path, chapters):
    with zipfile.ZipFile(path, 'w') as book:
        book.writestr(
            'META-INF/container.xml', '<container><rootfiles><rootfile full-path="O/c.opf"/></rootfiles></container>'
        )
        items = ''.join(f'<item id="c{i}" href="c%20{i}.xhtml"/>' for i in range(len(chapters)))
        order = ''.join(f'<itemref idref="c{i}"/>' for i in reversed(range(len(chapters))))
        book.writestr('O/c.opf', f'<package><manifest>{items}</manifest><spine>{order}</spine></package>')
        for i, text in enumerate(chapters):
            book.writestr(
                f'O/c {i}.xhtml', f'<html><head><title>no</title></head><body><h1>{text}</h1><p>a\n b</p></body></html>'
            )


def test_books(recipe, tmp_path):
    epub(tmp_path / 'b.epub', ['Zweites', 'Erstes'])
    (tmp_path / 'a.txt').write_text('a text')
    (tmp_path / 'c.md').write_text('# a heading')
    (tmp_path / 'd.png').write_bytes(b'no text')
    found = documents(recipe, {'path': str(tmp_path), 'kind': 'books'})
    assert [document.text for document in found] == ['a text', 'Erstes\n\na b\n\nZweites\n\na b', '# a heading']
    assert {document.kind for document in found} == {'books'}


def test_a_source_tree(recipe, tmp_path):
    (tmp_path / 'src' / 'deep').mkdir(parents=True)
    (tmp_path / 'LICENSE').write_text('Apache License, Version 2.0')
    (tmp_path / 'src' / 'deep' / 'a.py').write_text('x = 1\n')
    (tmp_path / 'src' / 'b.min.js').write_text('x')
    (document,) = documents(recipe, {'path': str(tmp_path), 'kind': 'code'})
    assert document.metadata == {'programming_language': 'python', 'licence': 'Apache-2.0'}


def test_tables(recipe, tmp_path):
    (tmp_path / 'a.csv').write_text('id,text\n1,"several\nlines, quoted"\n2,next\n')
    (tmp_path / 'b.tsv').write_text('text\tid\none\t1\n')
    (tmp_path / 'c.json').write_text('[{"text": "in a list"}]')
    found = documents(recipe, str(tmp_path))
    assert [document.text for document in found] == ['several\nlines, quoted', 'next', 'one', 'in a list']


def test_urls(recipe, tmp_path):
    import fsspec

    with fsspec.open('memory://bucket/a.jsonl.gz', 'wb', compression='gzip') as file:
        file.write(b'{"body": "from far away"}\n')
    found = documents(recipe, {'path': 'memory://bucket', 'text_key': 'body'})
    assert [document.text for document in found] == ['from far away']
    with pytest.raises(UserError, match=r'data\.sources\.a=?.*cannot be listed'):
        documents(recipe, {'path': 'nosuch://bucket'})


DUMP = """<mediawiki>
<page><title>Tree</title><ns>0</ns><revision><text>'''Tree''' is a [[plant|big plant]].{{cite|a={{b}}}}
== Wood ==
* [[Oak]]&lt;ref&gt;note&lt;/ref&gt; and [https://x.org more]
{| class="x"
| cell
|}
[[File:a.png|thumb|A [[leaf]]]]</text></revision></page>
<page><title>Talk:Tree</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>Trees</title><ns>0</ns><redirect title="Tree"/><revision><text>#REDIRECT</text></revision></page>
</mediawiki>"""


def test_wikipedia():
    ((title, text),) = books.wikipedia(io.BytesIO(DUMP.encode()), 1 << 20)
    assert (title, text) == ('Tree', 'Tree\n\nTree is a big plant.\n\nWood\n\n- Oak and more')


def test_a_file_cut_in_pieces_is_read_once(recipe, tmp_path, monkeypatch):
    texts = [f'{i} ' + 'x' * (i * 37 % 200) for i in range(300)]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    for size in (1000, 777, 100_000):
        monkeypatch.setattr(sources, '_CUT', size)
        found = documents(recipe, str(tmp_path / 'a.jsonl'))
        assert [document.text for document in found] == texts


@pytest.mark.parametrize('form', ['alpaca', 'messages', 'sharegpt', 'preference', 'prompt', 'pair'])
def test_records_pass_as_they_are(form, prepared, tmp_path):
    makers = {
        'alpaca': lambda i: {'instruction': prose(20, i), 'input': '', 'output': prose(20, -i - 1)},
        'messages': lambda i: {'messages': [{'role': 'user', 'content': prose(20, i)}]},
        'sharegpt': lambda i: {'conversations': [{'from': 'human', 'value': prose(20, i)}]},
        'preference': lambda i: {'prompt': prose(9, i), 'chosen': prose(20, i), 'rejected': prose(20, -i - 1)},
        'prompt': lambda i: {'prompt': prose(20, i)},
        'pair': lambda i: {'source': prose(20, i), 'target': prose(20, -i - 1)},
    }
    rows = [makers[form](i) for i in range(20)]
    bad = {'wrong': 1} if form != 'preference' else {'chosen': 'a', 'rejected': 'a'}
    (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in [*rows, rows[3], bad]))
    result = prepared('a', {'data.train': str(tmp_path / 'in.jsonl'), 'data.format': form, 'data.eval_fraction': 0.2})
    sides = [[row for _, row in open_records(str(tmp_path / 'a'), key)] for key in ('data.train', 'data.eval')]
    assert all(sides)
    assert sorted(map(json.dumps, sides[0] + sides[1])) == sorted(map(json.dumps, rows))
    assert result['metrics']['data/set_aside'] == 1


def test_instructions_from_documentation(prepared, tmp_path, monkeypatch):
    from jaxtune.data import stdlib

    real = [(name, text) for name, text in stdlib.modules() if name in ('textwrap', 'heapq', 'bisect', 'statistics')]
    monkeypatch.setattr(stdlib, 'modules', lambda: iter(real))
    prepared('a', {'data.train': 'python-stdlib', 'data.format': 'preference', 'data.eval_fraction': 0.3})
    train, held_out = (
        [row for _, row in open_records(str(tmp_path / 'a'), key)] for key in ('data.train', 'data.eval')
    )
    assert len(train) > 30
    assert all(row['chosen'] != row['rejected'] and len(row['prompt']) > 20 for row in train + held_out)
    dedent = next(row for row in train + held_out if '`textwrap.dedent' in row['prompt'])
    assert dedent['chosen'].startswith('Remove any common leading whitespace')
    # Both questions about one thing are on one side.
    answers = [
        {row['chosen'].split('\n\n', 1)[-1] if row['chosen'].startswith('That is') else row['chosen'] for row in side}
        for side in (train, held_out)
    ]
    assert not answers[0] & answers[1]


def test_references_to_stages_inside_sources(recipe, tmp_path):
    from jaxtune.recipe import recipes

    config = recipe({'data.sources': {'a': '@first', 'b': {'path': '@second', 'weight': 2.0}, 'c': 'x.txt'}})
    assert recipes.references(config) == {'first', 'second'}
    pointed = pipeline.point_to_stages(config, tmp_path)
    assert pointed.data.sources.a == str(tmp_path / 'first')
    assert pointed.data.sources.b.path == str(tmp_path / 'second')
    assert pointed.data.sources.c == 'x.txt'


def test_a_source_that_is_not_there(recipe, tmp_path, monkeypatch):
    """A path that looks local is no dataset's id, whatever its form; one that is neither is refused, not set aside."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    for path in ('data/code', 'data/code:x', 'no-such-owner/no-such-dataset'):
        with pytest.raises(UserError, match=rf'^data\.sources\.a={path}: no such file or folder'):
            documents(recipe, {'path': path, 'kind': 'code'})


def test_sources_on_the_command_line(tmp_path):
    """An empty path leaves a source out; a path becomes that of a source with fields."""
    from jaxtune.recipe import flags

    (tmp_path / 'recipe.py').write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    config = ConfigDict()\n'
        "    config.task = 'prepare'\n    config.data = ConfigDict()\n"
        "    config.data.sources = ConfigDict({'a': {'path': 'x', 'kind': 'web'}, 'b': {'path': 'y'}, 'c': 'z'})\n"
        '    return config\n'
    )

    def sources_of(*words):
        command = flags.parse(['jaxtune', f'--config={tmp_path}/recipe.py', *words])
        return command.configs[''].data.sources.to_dict()

    found = sources_of('--config.data.sources.b=', '--config.data.sources.c=', '--config.data.sources.a=w')
    assert found == {'a': {'path': 'w', 'kind': 'web'}}
    assert sources_of('--config.data.sources.c=w', '--config.data.sources.d=v')['d'] == 'v'
    with pytest.raises(UserError, match=r'data\.sources\.d=: expected the label of a source to leave out \(a, b, c\)'):
        sources_of('--config.data.sources.d=')


def test_a_page_of_a_dump_is_bounded():
    page = b'<page><title>T</title><ns>0</ns><text>%s</text></page>'
    dump = b'<mediawiki>' + page % b'fine' * 3 + page % (b'x' * 400_000) + b'</mediawiki>'
    assert len(list(books.wikipedia(io.BytesIO(dump), 1 << 20))) == 4
    found = books.wikipedia(io.BytesIO(dump), 100_000)
    assert [next(found) for _ in range(3)] == [('T', 'T\n\nfine')] * 3
    with pytest.raises(books.DamagedError, match=r'limits\.document_bytes=100000'):
        next(found)


def test_a_broken_archive_writes_nothing_to_stderr(recipe, tmp_path, capfd):
    head = 'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://x/\r\nContent-Type: application/http\r\n'
    body = 'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><p>text</p></html>'
    (tmp_path / 'a.warc').write_text(f'{head}Content-Length: {len(body) - 9}\r\n\r\n{body}\r\n\r\n' * 2)
    plan = plans.make(recipe({'data.sources': {'a': {'path': str(tmp_path / 'a.warc'), 'kind': 'web'}}}).data, '')
    (unit,) = sources.units(0, plan.sources[0])
    list(read(unit, plan, lambda *row: None))
    assert capfd.readouterr().err == ''


def test_links_of_a_source_are_followed_once(recipe, tmp_path, capsys):
    data, other = tmp_path / 'data', tmp_path / 'other'
    for folder, text in ((data, 'one'), (other, 'two')):
        folder.mkdir()
        (folder / 'a.jl').write_text(json.dumps({'text': text}) + '\n')
    (data / 'more').symlink_to(other)
    (other / 'back').symlink_to(data)
    (data / 'b.jl').symlink_to('nowhere.jl')
    assert [document.text for document in documents(recipe, {'path': str(data)})] == ['one', 'two']
    assert 'b.jl: left out: a link that leads nowhere' in ' '.join(capsys.readouterr().out.split())
    assert [document.text for document in documents(recipe, {'path': f'{data}/*.jl'})] == ['one']
