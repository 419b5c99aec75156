"""Labelled sources in recipes and on the command line: overrides, and references to earlier stages."""

import json

import pytest
from ml_collections import ConfigDict

from jaxtune.errors import UserError
from jaxtune.recipe import flags, recipes
from jaxtune.tasks import pipeline

MIXED = "config.data = ConfigDict({'train': {'chat': {'path': 'c.jsonl', 'weight': 2}, 'code': 'd.jsonl'}})"
STAGED = """config.stages = ('first', 'second')
config.first = ConfigDict({'task': 'prepare', 'data': {'train': 'python-stdlib'}})
config.second = ConfigDict({'data': {'train': '@first:0.5,x.jsonl:0.5', 'eval': {'held': '@first'}}})"""


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def parse(body, *words):
        lines = ['from ml_collections import ConfigDict', 'def get_config():', '    config = ConfigDict()']
        lines += [f'    {line}' for line in body.splitlines()]
        (tmp_path / 'recipe.py').write_text('\n'.join([*lines, '    return config', '']))
        return flags.parse(['jaxtune', '--config', 'recipe.py', *words]).configs

    return parse


def train(configs, stage=''):
    value = configs[stage].data.train
    return value.to_dict() if isinstance(value, ConfigDict) else value


CHAT, CODE = {'path': 'c.jsonl', 'weight': 2.0}, {'path': 'd.jsonl', 'weight': 1.0}
GIVEN = {
    (): {'chat': CHAT, 'code': CODE},
    ('chat.weight=0.5',): {'chat': CHAT | {'weight': 0.5}, 'code': CODE},
    ('chat=e.jsonl', 'new=f.jsonl', 'new.weight=3'): {
        'chat': CHAT | {'path': 'e.jsonl'},
        'code': CODE,
        'new': {'path': 'f.jsonl', 'weight': 3.0},
    },
    ('chat=',): {'code': CODE},
}


@pytest.mark.parametrize('words', GIVEN)
def test_the_command_line_names_parts_of_sources(parse, words):
    assert train(parse(MIXED, *[f'--config.data.train.{word}' for word in words])) == GIVEN[words]


def test_the_command_line_takes_the_place_of_sources(parse):
    assert train(parse(MIXED, '--config.data.train=x.jsonl')) == 'x.jsonl'
    both = {'a': {'path': 'a.jsonl', 'weight': 0.7}, 'b': {'path': 'b.jsonl', 'weight': 0.3}}
    assert train(parse(MIXED, '--config.data.train=a.jsonl:0.7,b.jsonl:0.3')) == both
    named = [f'--config.data.train.{name}={name}.jsonl' for name in 'ab']
    assert set(train(parse('', *named))) == {'a', 'b'}
    configs = parse(STAGED, '--config.second.data.train.x.weight=4')
    assert train(configs, 'second') == {
        'first': {'path': '@first', 'weight': 0.5},
        'x': {'path': 'x.jsonl', 'weight': 4.0},
    }


WRONG = {
    'data.train.chat.weight=-1': "a weight > 0 of 'chat'; found -1",
    'data.train.chat.wieght=1': 'nearest: weight',
    'data.train.other=': r'the label of a source to leave out \(chat, code\)',
    'data.eval.chat=': r'the label of a source to leave out \(none\)',
    'data.train.new.weight=2': "a path of 'new'",
    'data.trian.chat=x': 'unknown key',
}


@pytest.mark.parametrize('word', WRONG)
def test_a_wrong_part_is_said(parse, word):
    with pytest.raises(UserError, match=WRONG[word]):
        parse(MIXED, f'--config.{word}')


def test_a_path_has_no_label(parse):
    with pytest.raises(UserError, match=r"data\.train is 'p\.jsonl'; expected a mapping of sources"):
        parse("config.data = ConfigDict({'train': 'p.jsonl'})", '--config.data.train.chat=c.jsonl')


def test_sources_are_outputs_of_earlier_stages(parse, tmp_path):
    config = parse(STAGED)['second']
    assert recipes.references(config) == {'first'}
    placed = pipeline.point_to_stages(config, tmp_path)
    assert placed.data.train.first.path == placed.data.eval.held.path == str(tmp_path / 'first')
    assert placed.data.train.x.path == 'x.jsonl'
    with pytest.raises(UserError, match=r"second.data.train.other.path='@other': expected the name of an earlier"):
        parse(STAGED, '--config.second.data.train=@other:1,x.jsonl:1')


def test_a_stored_recipe_is_the_same_recipe(parse):
    config = parse(MIXED)['']
    stored = json.loads(config.to_json())
    assert recipes.differing(stored, config) == []
    again = recipes.defaults()
    recipes.apply_overrides(again, recipes.flatten(ConfigDict(stored, type_safe=False)))
    assert again.data.train == config.data.train
    (found,) = recipes.differing(stored, parse(MIXED, '--config.data.train.chat.weight=3')[''])
    assert found.startswith('data.train')


def test_a_field_of_a_source_has_no_parts(parse):
    with pytest.raises(UserError, match=r'--config\.data\.train\.chat\.path\.x: unknown key'):
        parse(MIXED, '--config.data.train.chat.path.x=1')
