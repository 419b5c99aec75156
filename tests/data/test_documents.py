import gzip
import json
import os

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from jaxtune.data import datasets_hub, stdlib
from jaxtune.data.documents import open_documents
from jaxtune.data.records import check_tables
from jaxtune.errors import UserError


def read(path, **arguments):
    return list(open_documents(str(path), **arguments))


def lines(*records):
    return ''.join(json.dumps(record) + '\n' for record in records)


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / 'a.txt').write_bytes('\ufeffzwei\r\nZeilen\n\n'.encode())
    assert read(tmp_path / 'a.txt') == ['zwei\r\nZeilen\n\n']
    (tmp_path / 'code.unknown').write_text('named, so read')
    assert read(tmp_path / 'code.unknown') == ['named, so read']


@given(texts=st.lists(st.text()))
def test_jsonl_is_a_record_a_line(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp('jsonl') / 'a.jsonl'
    file.write_bytes('\n'.join(json.dumps({'text': text}, ensure_ascii=False) for text in texts).encode() + b'\n\n')
    assert read(file) == texts


def test_every_format_alone_compressed_and_in_a_folder(tmp_path):
    (tmp_path / 'sub' / 'deep').mkdir(parents=True)
    (tmp_path / 'sub' / 'a.jsonl').write_text(lines({'text': '1'}, {'text': '2'}))
    with gzip.open(tmp_path / 'sub' / 'b.jsonl.gz', 'wt') as file:
        file.write(lines({'text': '3'}))
    with pyarrow.output_stream(str(tmp_path / 'sub' / 'c.txt.zst'), compression='zstd') as stream:
        stream.write(b'4')
    (tmp_path / 'sub' / 'd.json').write_text(json.dumps([{'text': '5'}, {'text': '6'}], indent=1))
    (tmp_path / 'sub' / 'e.json').write_text(json.dumps({'text': '7'}, indent=1))
    (tmp_path / 'sub' / 'f.json').write_text(lines({'text': '8'}, {'text': '9'}))
    parquet.write_table(pyarrow.table({'n': [1, 2], 'text': ['10', '11']}), tmp_path / 'sub' / 'g.parquet')
    (tmp_path / 'sub' / 'deep' / 'h.md').write_text('12')
    (tmp_path / 'sub' / '.hidden.txt').write_text('never')
    (tmp_path / 'sub' / 'picture.png').write_bytes(b'\x89PNG')
    in_order = ['1', '2', '3', '4', '5', '6', '12', '7', '8', '9', '10', '11']
    assert read(tmp_path) == in_order
    assert read(tmp_path / 'sub' / '*.json*') == ['1', '2', '3', '5', '6', '7', '8', '9']
    assert read(tmp_path / '**' / '*.txt.zst') == ['4']


def test_documents_can_be_read_again_and_know_when_they_change(tmp_path):
    file = tmp_path / 'a.jsonl'
    file.write_text(lines({'text': 'é'}, {'text': 'b'}))
    documents = open_documents(str(file))
    assert list(documents) == list(documents) == ['é', 'b']
    assert documents.measure() == (2, 3)
    assert open_documents(str(file)).identity == documents.identity
    os.utime(file, (1, 1))
    assert open_documents(str(file)).identity != documents.identity
    assert open_documents(str(file), text_key='body').identity != open_documents(str(file)).identity


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        (b'{"text": "b"', 'one JSON object'),
        (b'{"text": "\xff"}', 'UTF-8'),
        (b'["b"]', "an object with the text in 'text' (data.text_key); found ['b']"),
        (b'{"body": "b", "id": 1}', "field 'text' (data.text_key); found 'body', 'id'"),
        (b'{"text": 7}', 'a text in'),
        (b'{"text": null}', 'a text in'),
        (b'{"text": "\\ud83d"}', r'half a surrogate pair, \ud83d'),
    ],
)
def test_a_broken_line_is_named(line, words, tmp_path):
    file = tmp_path / 'a.jsonl'
    file.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value).startswith(f'{file}:3: expected')
    assert words in str(caught.value)
    assert '\n' not in str(caught.value)


def test_other_damage_is_named(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'fine\nnot \xff fine')
    with pytest.raises(UserError, match=r'a\.txt:2: expected UTF-8 text, found the byte 0xff'):
        read(tmp_path / 'a.txt')
    (tmp_path / 'a.json').write_text('[{"text": "a"},\n{"text" "b"}]')
    with pytest.raises(UserError, match=r'a\.json:2: expected JSON'):
        read(tmp_path / 'a.json')
    parquet.write_table(pyarrow.table({'body': ['a']}), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=r"a\.parquet: expected a column 'text'.*found body"):
        read(tmp_path / 'a.parquet')
    (tmp_path / 'b.parquet').write_bytes(b'PAR1 no more')
    with pytest.raises(UserError, match=r'b\.parquet'):
        read(tmp_path / 'b.parquet')
    whole = gzip.compress(lines({'text': 'a' * 99}).encode())
    (tmp_path / 'c.jsonl.gz').write_bytes(whole[:-12])
    with pytest.raises(UserError, match=r'c\.jsonl\.gz'):
        read(tmp_path / 'c.jsonl.gz')


def test_nothing_there(tmp_path):
    for path, words in {
        '': r"data\.eval='': expected a path",
        str(tmp_path / 'no.txt'): 'no such file',
        'folder/no.jsonl': r'data\.eval=folder/no\.jsonl: no such file',
        str(tmp_path / '*.txt'): 'no file matches',
        str(tmp_path): 'the folder holds no data',
        'no-such-owner/no-such-dataset': 'no such file or folder, and the hub gives no',
    }.items():
        with pytest.raises(UserError, match=words):
            open_documents(path, 'data.eval')
    (tmp_path / 'a.txt').write_text('')
    with pytest.raises(UserError, match=r'data\.eval=.*a\.txt: the data is empty'):
        open_documents(str(tmp_path / 'a.txt'), 'data.eval').measure()


def test_python_stdlib_is_much_real_text():
    documents = open_documents('python-stdlib')
    texts = list(documents)
    assert sum(len(text.encode()) for text in texts) > 5_000_000
    assert texts == list(documents)
    assert any('class JSONDecoder' in text for text in texts)
    assert any(text.startswith('builtins\n') and 'builtins.str.partition' in text for text in texts)
    assert not any(folder in file.parts for file in stdlib._files() for folder in ('site-packages', 'test'))
    # An address in a docstring would make every run's text another one.
    assert not any(' object at 0x' in stdlib._docstrings(name) for name in stdlib._IN_C)


def test_a_dataset_of_the_hub(monkeypatch):
    def load_dataset(path, config):
        assert (path, config) in (('owner/name', None), ('owner/name', 'small'))
        columns = {'text': [config or 'default', 'b'], 'body': ['c', 'd']}
        splits = {name: datasets.Dataset.from_dict(columns) for name in ('train', 'test', 'extra')}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr(datasets_hub, 'check', lambda path, name: None)  # it asks the hub
    assert read('owner/name') == ['default', 'b']
    assert read('owner/name:small') == ['small', 'b']
    assert read('owner/name::extra', text_key='body') == ['c', 'd']
    assert read('owner/name', key='data.eval') == ['default', 'b']
    with pytest.raises(UserError, match=r'owner/name:CONFIG:SPLIT; the dataset has train, test, extra'):
        read('owner/name::validation')
    with pytest.raises(UserError, match=r"expected a column 'story'.*found text, body"):
        read('owner/name', text_key='story')


def test_lines_and_tables_by_any_of_their_names(tmp_path, capsys):
    for suffix in ('jsonlines', 'jl', 'ndjson'):
        (tmp_path / f'a.{suffix}').write_text(lines({'text': '1'}, {'text': '2'}))
        assert read(tmp_path / f'a.{suffix}') == ['1', '2']
    (tmp_path / 'a.csv').write_text('\ufeffid,text\n1,"a, b\nc"\n\n2,é\n')
    (tmp_path / 'a.tsv').write_text('text\tid\na, b\t1\n')
    assert read(tmp_path / 'a.csv') == ['a, b\nc', 'é']
    assert read(tmp_path / 'a.tsv') == ['a, b']
    with pytest.raises(UserError, match=r'^data\.train=.*a\.csv is a table; expected data\.format to say'):
        check_tables(str(tmp_path), 'data.train')
    check_tables(str(tmp_path / 'a.jl'), 'data.train')
    (tmp_path / 'b.csv').write_text('text\n' + 'x' * 200_000 + '\n')
    assert len(read(tmp_path / 'b.csv')[0]) == 200_000
    (tmp_path / 'a.weird').write_text('one text')
    assert read(tmp_path / 'a.weird') == ['one text']
    assert 'read as one text: .weird is none of .jsonl' in ' '.join(capsys.readouterr().out.split())
    assert len(read(tmp_path)) == 2 * 3 + 4
    assert 'left out 1 of 7 files, of unknown suffixes: .weird' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('id,text\n1,a,b\n', r'a\.csv:2: expected 2 cells, as there are columns; found 3'),
        ('id,text\n1,a\n2\n', r'a\.csv:3: expected 2 cells'),
        ('text,text\na,b\n', r'a\.csv:1: expected the names of the columns, each once'),
        ('text\n"open\n', r'a\.csv:2: expected a row of a table in UTF-8'),
        ('body\na\n', r"a\.csv:2: expected the field 'text' \(data\.text_key\); found 'body'"),
    ],
)
def test_a_broken_table_is_named(text, words, tmp_path):
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(UserError, match=words):
        read(tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_bytes(text.encode() + b'\xff\xff')
    with pytest.raises(UserError, match=r'a\.csv:\d'):
        read(tmp_path / 'a.csv')


def test_links_are_followed_once(tmp_path):
    data, other = tmp_path / 'data', tmp_path / 'other'
    (data / 'b').mkdir(parents=True)
    (other / 'deep').mkdir(parents=True)
    for folder, text in ((data, '1'), (data / 'b', '2'), (other, '3'), (other / 'deep', '4')):
        (folder / 'a.txt').write_text(text)
    (tmp_path / 'c.txt').write_text('5')
    (data / 'a-again').symlink_to(other)
    (data / 'z-again').symlink_to(other)  # a second way to the same
    (data / 'c.txt').symlink_to(tmp_path / 'c.txt')
    (data / 'd.txt').symlink_to(data / 'b' / 'a.txt')  # in the folder already
    (other / 'back').symlink_to(data)  # a loop
    (other / 'deep' / 'itself').symlink_to('.')
    assert sorted(read(data)) == ['1', '2', '3', '4', '5']
    assert sorted(read(tmp_path / 'd*')) == ['1', '2', '3', '4', '5']
    os.link(data / 'a.txt', data / 'e.txt')  # a file of its own
    assert sorted(read(data)) == ['1', '1', '2', '3', '4', '5']


def test_what_is_no_file_is_left_out_or_named(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('1')
    os.mkfifo(tmp_path / 'b.txt')
    assert read(tmp_path) == read(tmp_path / '*.txt') == ['1']
    assert 'b.txt: left out: not a regular file' in ' '.join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r'b\.txt: not a regular file'):
        read(tmp_path / 'b.txt')
    for target in ('nowhere.txt', 'c.txt'):
        (tmp_path / 'c.txt').symlink_to(target)
        for path in (tmp_path, tmp_path / '*.txt', tmp_path / 'c.txt'):
            with pytest.raises(UserError, match=r'c\.txt: a link that leads nowhere'):
                read(path)
        (tmp_path / 'c.txt').unlink()
