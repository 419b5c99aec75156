"""Short commands: the long ones that they stand for, help, and words that are refused."""

import pathlib

import pytest

from jaxtune.config import SCHEMA
from jaxtune.errors import UserError
from jaxtune.main import main
from jaxtune.recipe import flags, recipes, shipped
from jaxtune.verbs import VERBS
from jaxtune.verbs.expand import expand


def long(*words):
    return expand(['jaxtune', *words])


@pytest.mark.parametrize('name', [name for name, verb in VERBS.items() if verb.recipe])
def test_every_verb_fills_in_a_shipped_recipe_and_keys_that_there_are(name, capsys):
    verb = VERBS[name]
    recipe = recipes.read_recipe(shipped.find(verb.recipe))
    stages = recipes.resolve(recipe)
    keys = {*SCHEMA, *(f'{stage}.{key}' for stage in stages for key in SCHEMA)}
    assert {*verb.takes.values(), *(key for key, _ in verb.options.values())} <= keys
    words = [f'{taken.strip("[]")}.jsonl' for taken in verb.takes]
    argv = long(name, *words, '--workdir', 'w', 'seed=3')
    assert argv[:3] == ['jaxtune', '--config', shipped.find(verb.recipe)]
    for (_, key), word in zip(verb.takes.items(), words, strict=True):
        assert f'--config.{key}={word}' in argv
    assert argv[-3:] == ['--workdir', 'w', '--config.seed=3']
    command = flags.parse(argv)
    assert {config.seed for config in command.configs.values()} == {3}
    assert str(command.workdir) == 'w'
    assert capsys.readouterr().err.startswith(f'jaxtune {name} is: python -m jaxtune.main --config ')


def test_options_take_their_value_either_way():
    assert long('fit', 'm', '--on', 'v5e-4,h100x8')[-1] == '--config.compile.topology=v5e-4,h100x8'
    assert long('fit', 'm', '--on=v5e-4')[-1] == '--config.compile.topology=v5e-4'
    (config,) = flags.parse(long('fit', 'm', '--seq-len', '2048,8192', '--methods', 'lora')).configs.values()
    assert config.compile.seq_lens == (2048, 8192)
    assert config.compile.methods == 'lora'


def test_the_long_command_passes_through():
    words = ['jaxtune', '--config', 'configs/sft.py', '--config.seed=1']
    assert expand(words) == words


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['sftt'], 'jaxtune sftt: no such verb; expected one of .*; nearest: sft'),
        (['sft'], r'MODEL is missing\. Usage: jaxtune sft MODEL DATA \[HELD_OUT\] \[KEY=VALUE \.\.\.\]'),
        (['sft', 'm'], 'DATA is missing'),
        (['fit', 'm', 'n'], "'n': expected KEY=VALUE here"),
        (['fit', 'm', '--onn', 'x'], '--onn: expected one of --on, --methods, --seq-len'),
        (['fit', 'm', '--on'], '--on: expected a value after it'),
        (['serve', 'm', '--port'], '--port: expected a value after it: the port to listen at'),
        (['recipes', 'x'], "'x': expected nothing more"),
        (['keys', 'learnin_rate'], 'no key has this in its name; nearest: optimizer.lr'),
    ],
)
def test_wrong_words_are_refused_by_name(words, said, capsys):
    with pytest.raises(UserError, match=said):
        long(*words)
    assert main(['jaxtune', *words]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_a_programs_flags_take_their_value_either_way(monkeypatch):
    given = []
    monkeypatch.setattr('jaxtune.serve.cli', given.extend)
    assert long('serve', '--port', '1', 'm', '--slots=2') is None
    assert given == ['serve', '--port=1', '--model=m', '--slots=2']


def test_a_key_given_by_its_name_needs_no_place(capsys):
    assert long('sft', 'm', 'data.train=d')[-1] == '--config.data.train=d'


@pytest.mark.parametrize(
    'words', [[], ['--help'], ['help'], ['--help', 'fit'], ['fit', '--help'], ['fit', '-h'], ['serve', '--help']]
)
def test_help_is_80_columns_wide(words, capsys):
    assert main(['jaxtune', *words]) == 0
    out = capsys.readouterr().out
    assert 'jaxtune fit' in out or 'VERB' in out or '--max_queue' in out
    assert max(map(len, out.splitlines())) <= 80


def test_recipes_and_keys_are_listed(capsys):
    assert main(['jaxtune', 'recipes']) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines() if line[0] != ' '} == set(shipped.names())
    assert main(['jaxtune', 'keys']) == 0
    printed = capsys.readouterr().out
    assert all(f'{key}=' in printed or f'{key}.*' in printed for key in SCHEMA)


def test_a_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pathlib.Path(flags.parse(['jaxtune', '--config', 'sft', '--config.model.path=m']).recipe).is_file()
    with pytest.raises(UserError, match=r"--config='sfft': no such file; expected a recipe such as .*sft\.py"):
        flags.parse(['jaxtune', '--config=sfft'])
