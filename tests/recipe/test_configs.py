"""The recipes of configs/: each is read, and so is each command that its docstring gives."""

import ast
import pathlib
import shlex

import pytest

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
