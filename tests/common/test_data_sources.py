"""Sources of a recipe: paths that hold colons and commas, labels, weights, and what is refused."""

import math

import pytest

from jaxtune.common import sources
from jaxtune.common.checks import ExpectedError
from jaxtune.common.sources import DataSource, check, read


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


ONE_PATH = ['a.jsonl', 'corpus/*.jsonl', '@prepare', 'python-stdlib', 'glue:sst2:train', 'owner/name:0', 'auto', '']


@pytest.mark.parametrize('text', ONE_PATH)
def test_a_text_without_a_comma_is_one_path(text):
    assert check(text) == text
    assert read(text) == ((DataSource('', text),) if text else ())


TEXTS = {
    'a.jsonl:0.7,b.jsonl:0.3': [('a', 'a.jsonl', 0.7), ('b', 'b.jsonl', 0.3)],
    'a.jsonl, b.jsonl:3': [('a', 'a.jsonl', 1.0), ('b', 'b.jsonl', 3.0)],
    'glue:sst2:train:.5,x/y.jsonl.gz:1e-1': [('glue_sst2_train', 'glue:sst2:train', 0.5), ('y', 'x/y.jsonl.gz', 0.1)],
    'o/wiki:20231101.en:2,@web:1': [('wiki_20231101', 'o/wiki:20231101.en', 2.0), ('web', '@web', 1.0)],
    'one,two.jsonl:2,b.jsonl:1': [('one_two', 'one,two.jsonl', 2.0), ('b', 'b.jsonl', 1.0)],
    'x/train.jsonl,y/train.jsonl,train': [
        ('train', 'x/train.jsonl', 1.0),
        ('train_2', 'y/train.jsonl', 1.0),
        ('train_3', 'train', 1.0),
    ],
    'books/*.txt:1,~/*:2': [('books', 'books/*.txt', 1.0), ('source', '~/*', 2.0)],
}


@pytest.mark.parametrize('text', TEXTS)
def test_a_text_of_several_sources(text):
    expected = {label: {'path': path, 'weight': weight} for label, path, weight in TEXTS[text]}
    assert check(text) == expected
    assert check(check(text)) == expected


def test_a_file_with_a_comma_is_one_path_where_it_is_there(tmp_path):
    (tmp_path / 'a.jsonl:0.7,b.jsonl:0.3').write_text('')
    assert check('a.jsonl:0.7,b.jsonl:0.3') == 'a.jsonl:0.7,b.jsonl:0.3'
    assert check('a*,b*') == 'a*,b*'


def test_a_mapping_is_read_by_label():
    value = check({'code': 'c.jsonl', 'chat': {'path': 'm.jsonl', 'weight': 2, 'format': 'messages', 'text_key': ''}})
    assert value == {
        'code': {'path': 'c.jsonl', 'weight': 1.0},
        'chat': {'path': 'm.jsonl', 'format': 'messages', 'weight': 2.0},
    }
    chat, code = read(value)
    assert chat == DataSource('chat', 'm.jsonl', 2.0, 'messages')
    assert code == DataSource('code', 'c.jsonl')
    assert sources.words(value) == 'code, chat'


REFUSED = {
    'an empty mapping': ({}, 'at least one source'),
    'a slash': ({'a/b': 'x'}, 'labels of letters'),
    'a blank': ({'a b': 'x'}, 'labels of letters'),
    'no label': ({'': 'x'}, 'labels of letters'),
    'a number as label': ({3: 'x'}, 'labels of letters'),
    'no path': ({'a': {'weight': 1}}, "a path of 'a'"),
    'an empty path': ({'a': ''}, "a path of 'a'"),
    'an unknown field': ({'a': {'path': 'x', 'wieght': 1}}, 'nearest: weight'),
    'a weight of 0': ({'a': {'path': 'x', 'weight': 0}}, "a weight > 0 of 'a'"),
    'a negative weight': ({'a': {'path': 'x', 'weight': -1}}, "a weight > 0 of 'a'"),
    'no number': ({'a': {'path': 'x', 'weight': math.nan}}, "a weight > 0 of 'a'"),
    'without end': ({'a': {'path': 'x', 'weight': math.inf}}, "a weight > 0 of 'a'"),
    'a truth': ({'a': {'path': 'x', 'weight': True}}, "a weight > 0 of 'a'"),
    'a word as weight': ({'a': {'path': 'x', 'weight': 'much'}}, "a weight > 0 of 'a'"),
    'a format': ({'a': {'path': 'x', 'format': 'chats'}}, "as format of 'a'"),
    'a list': (['a'], 'a path, or a mapping'),
    'a number as source': ({'a': 3}, 'a path or fields'),
    'a number as path': ({'a': {'path': 3}}, "a text as path of 'a'"),
    'a text weight of 0': ('a.jsonl:0,b.jsonl:1', "a weight > 0 of 'a.jsonl'"),
    'a text weight below 0': ('a.jsonl:1,b.jsonl:-1', "a weight > 0 of 'b.jsonl'"),
    'a text weight that is none': ('a.jsonl:nan,b.jsonl', "a weight > 0 of 'a.jsonl'"),
    'nothing between commas': ('a.jsonl,,b.jsonl', 'a path before and after each comma'),
    'nothing at the end': ('a.jsonl:1,b.jsonl:1,', 'a path before and after each comma'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_wrong_is_said(name):
    value, expected = REFUSED[name]
    with pytest.raises(ExpectedError, match=expected):
        check(value)
