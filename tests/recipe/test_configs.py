"""The recipes of configs/: each is read, and so is each command that its docstring gives."""

import ast
import json
import pathlib
import shlex

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune.errors import UserError
from jaxtune.recipe import flags, recipes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').glob('*.py'))
START = 'python -m jaxtune.main '


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def commands(path: str) -> list[list[str]]:
    """The words of each command in a recipe's docstring; what is in brackets may be left out and is tried."""
    text = ast.get_docstring(ast.parse(pathlib.Path(path).read_text(encoding='utf-8'))) or ''
    lines = text.replace('\\\n', ' ').splitlines()
    return [shlex.split(line.replace('[', '').replace(']', '')) for line in lines if line.strip().startswith(START)]


@pytest.mark.parametrize('path', CONFIGS)
def test_recipe_and_its_commands(path):
    recipe = recipes.read_recipe(path)
    stages = recipes.stage_names(recipe)
    assert commands(path), 'its docstring gives no command'
    for words in commands(path):
        command = flags.parse(words[2:])
        assert command.recipe == path
        assert tuple(command.configs) == stages or (stages == () and tuple(command.configs) == ('',))
        given = [word for word in words if word.startswith('--config.') and not word.startswith('--config.stages=')]
        assert all(recipes.changed(config) for config in command.configs.values())
        for word in given:
            *_, key = word.partition('=')[0].removeprefix('--config.').rpartition('.')
            assert any(key in name for config in command.configs.values() for name in _names(config)), word


def _names(config) -> list[str]:
    """The keys of a recipe, and the labels of its sources."""
    flat = recipes.flatten(config)
    labels = [f'{name}.{label}' for name, value in flat.items() if isinstance(value, dict) for label in value]
    return [*flat, *labels]


@pytest.mark.parametrize('held', ['()', '{"<q>": "what"}', '("<q>", "<r>")', '"<q>"'])
@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ('<a>, <b>', (('<a>', ''), ('<b>', ''))),
        ("('<a>', '<b>')", (('<a>', ''), ('<b>', ''))),
        ("{'<a>': 'a fox, maybe'}", (('<a>', 'a fox, maybe'),)),
    ],
)
def test_tokens_to_add_are_read_alike_whatever_the_recipe_holds(held, given, expected, tmp_path):
    lines = ['from ml_collections import ConfigDict', 'def get_config():', f'  add = {held}']
    (tmp_path / 'recipe.py').write_text('\n'.join([*lines, '  return ConfigDict({"tokenizer": {"add": add}})', '']))
    words = ['jaxtune', '--config', str(tmp_path / 'recipe.py')]
    own = flags.parse(words).configs['']
    assert all(len(pair) == 2 for pair in own.tokenizer.add)
    config = flags.parse([*words, f'--config.tokenizer.add={given}']).configs['']
    assert config.tokenizer.add == expected
    stored = json.loads(config.to_json())  # as a workdir keeps it
    assert recipes.differing(stored, config) == []
    assert [name.split()[0] for name in recipes.differing(stored, own)] == ['tokenizer.add']
    again = recipes.defaults()
    recipes.apply_overrides(again, recipes.flatten(ConfigDict(stored, type_safe=False)))
    assert again.tokenizer.add == expected


def test_another_mesh_is_another_result_of_compile_alone():
    def differences(task):
        config = recipes.defaults()
        recipes.apply_overrides(config, {'task': task})
        stored = json.loads(config.to_json())
        recipes.apply_overrides(config, {'mesh.fsdp': 4})
        return [name.split()[0] for name in recipes.differing(stored, config)]

    assert differences('train') == []
    assert differences('compile') == ['mesh.fsdp']


@pytest.mark.parametrize('key', ['method.also_train', 'log.profile', 'eval.metric', 'mesh.data'])
def test_an_array_is_refused_as_a_list_is(key):
    config = recipes.defaults()
    with pytest.raises(UserError, match=rf'{key}=\[0\.0, 0\.0\]: expected '):
        recipes.apply_overrides(config, {key: np.zeros(2)})
