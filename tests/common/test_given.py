"""What is typed at the door and what a person's own code does: one line that names it, whatever it is."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
from ml_collections import ConfigDict

from jaxtune.common import imports, jsonfile, paths, stderr
from jaxtune.common.checks import integer
from jaxtune.config import SCHEMA
from jaxtune.errors import UserError, out_of_memory, shown
from jaxtune.methods import peft
from jaxtune.recipe import flags, recipes
from jaxtune.recipe.aliases import nearest

PATHS = (
    'model.path', 'tokenizer.path', 'method.path', 'data.train', 'data.eval', 'data.template', 'sft.demonstrations',
    'dpo.reference', 'rl.reward', 'data.steps.language.model', 'data.steps.filter.blocklist',
    'data.steps.decontaminate.against',
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path) -> pathlib.Path:
    path = tmp_path / 'recipe.py'
    path.write_text('from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n')
    return path


@pytest.mark.parametrize('key', PATHS)
def test_paths_that_no_system_call_takes(key):
    for value in ('~no_such_user_here/x', 'x' * 5000, 'a\0b', '\udcff', 'a/' * 3000):
        with pytest.raises(UserError, match=rf'^{key}=') as caught:
            recipes.apply_overrides(recipes.defaults(), {key: value})
        assert len(str(caught.value)) < 500
    recipes.apply_overrides(recipes.defaults(), {key: '~/not/there'})


@pytest.mark.parametrize('source', ['~no_such_user_here/x', {'path': 'x' * 5000}, {'path': 'a\0b', 'weight': 1}])
def test_paths_of_sources_that_no_system_call_takes(recipe, source):
    given = recipes.read_recipe(str(recipe))
    given.data = ConfigDict({'sources': {'web': source}})
    with pytest.raises(UserError, match=r'^data\.sources\.web'):
        recipes.resolve(given)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('seed', 2**63),
        ('seed', 10**5000),
        ('train.steps', '9' * 5000),
        ('train.steps', 1e300),
        ('train.epochs', float('inf')),
        ('train.epochs', 10**400),
        ('optimizer.lr', float('nan')),
        ('data.target_len', 2**31),
        ('generate.beams', 2**31),
        ('generate.batch_size', 2**40),
        ('generate.prompts', 10**5000),
        ('method.bottleneck', 2**31),
        ('data.steps.dedup.hashes', 2**40),
        ('method.layers', '9' * 5000 + ':'),
        ('method.layers', (10**5000,)),
        ('method.ranks', 'q_proj=' + '9' * 5000),
        ('method.targets', '(' * 5000),
        ('sft.system', '\ud800'),
        ('method.targets', ('\ud800',)),
        ('objective', ['sft']),
        ('model.config', {'hidden_size': float('inf')}),
        ('model.config', {'hidden_size': {1: 2}}),
        ('model.config', {'hidden_size': object()}),
    ],
    ids=lambda part: part if isinstance(part, str) and len(part) < 40 else type(part).__name__,
)
def test_values_without_sense_are_named(key, value):
    with pytest.raises(UserError, match=rf'^{key}=') as caught:
        recipes.apply_overrides(recipes.defaults(), {key: value})
    assert len(str(caught.value)) < 500
    assert 'expected' in str(caught.value)


def test_names_that_a_subtree_cannot_hold_are_said():
    config = recipes.defaults()
    recipes.apply_overrides(config, {'custom': {'gamma': 1, 'inner': {'beta': 2}}})
    assert config.custom.inner.beta == 2
    for name in ('__class__', '__init__'):
        with pytest.raises(UserError, match=f'^custom: expected other names than .*{name}'):
            recipes.apply_overrides(config, {'custom': {name: 1}})


def test_every_number_has_an_upper_bound():
    """Of each key that takes an integer, one of 5,000 digits is refused, as a number and as a text."""
    for path, key in SCHEMA.items():
        if type(getattr(key, 'default', None)) is int:
            for value in (10**5000, '9' * 5000):
                with pytest.raises(UserError, match=rf'^{path}='):
                    recipes.apply_overrides(recipes.defaults(), {path: value})
    assert integer(0, high=7)('+7') == 7


@pytest.mark.parametrize(
    ('word', 'expected'),
    [
        ('--config.sft.system=\udcff', 'UTF-8'),
        ('--config.data.sources.../x=1', '--config.data.sources.../x'),
        ('--config.data.sources.a b=1', '--config.data.sources.a b'),
        ('--config..x=1', '--config..x'),
        ('--config.model.config.x=' + '-' * 3000 + '1', '--config.model.config.x'),
        ('--config.method.targets=' + '[' * 3000, 'method.targets='),
        ('--config.train.steps=' + '9' * 5000, '--config.train.steps='),
        ('--workdir=' + 'x' * 5000, '--workdir='),
        ('--workdir=~no_such_user_here/x', '--workdir='),
    ],
)
def test_odd_arguments(recipe, word, expected):
    with pytest.raises(UserError) as caught:
        flags.parse(['jaxtune', '--config', str(recipe), word])
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_workdir_that_is_a_file(recipe):
    for word in (f'--workdir={recipe}', f'--workdir={recipe}/run'):
        with pytest.raises(UserError, match=r'--workdir=.*recipe\.py is a file'):
            flags.parse(['jaxtune', '--config', str(recipe), word])


@pytest.mark.parametrize(
    ('given', 'meant'),
    [
        ('train.learning_rate', 'optimizer.lr'),
        ('train.lr', 'optimizer.lr'),
        ('optimizer.learning_rte', 'optimizer.lr'),
        ('batch_size', 'train.batch_size'),
        ('data.batch_size', 'train.batch_size'),
        ('method', 'method.name'),
        ('lora.rank', 'method.rank'),
        ('lora_r', 'method.rank'),
        ('max-seq-length', 'data.seq_len'),
        ('model_path', 'model.path'),
        ('train.stpes', 'train.steps'),
        ('zzzz', ''),
    ],
)
def test_the_key_that_is_meant(given, meant):
    assert nearest(given) == meant


def test_a_function_of_a_file_and_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / 'helper.py').write_text('VALUE = 3\n')
    (tmp_path / 'my_rewards.py').write_text('import helper\ndef f():\n    return helper.VALUE\nnumber = 1\n')
    (tmp_path / 'own_names.py').write_text('def __getattr__(name):\n    raise ValueError(name)\n')
    assert imports.function('rl.reward', f'{tmp_path}/my_rewards.py:f')() == 3
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert imports.function('rl.reward', 'my_rewards:f')() == 3
    assert imports.function('rl.reward', 'my_rewards.py:f') is imports.function(
        'rl.reward', f'{tmp_path}/my_rewards.py:f'
    )
    assert sys.path == before
    for name, words in (
        ('my_rewards.py:g', r"has no 'g'"),
        ('my_rewards.py:number', 'expected a function, found int'),
        ('own_names.py:f', r"does not give 'f': ValueError: f"),
        ('gone.py:f', 'no such file'),
        ('gone:f', 'module:function'),
        ('my_rewards', 'module:function'),
        (':f', 'module:function'),
        ('os:', 'module:function'),
    ):
        with pytest.raises(UserError, match=words) as caught:
            imports.function('rl.reward', name)
        assert str(caught.value).startswith((f'rl.reward={name}', f'rl.reward={name!r}'))


@pytest.mark.parametrize(
    ('body', 'line'),
    [
        ('import sys\nsys.exit(0)\n', 2),
        ('x = (\n', 1),
        ('\n1 / 0\n', 2),
        ('class Odd(BaseException): pass\nraise Odd\n', 2),
        ('import no_such_module_at_all\n', 1),
        ('def f(): return f()\nf()\n', 1),
    ],
)
def test_a_module_that_fails_when_it_is_imported(tmp_path, monkeypatch, body, line):
    (tmp_path / 'fails_at_once.py').write_text(body)
    monkeypatch.chdir(tmp_path)
    for name in ('fails_at_once.py:f', 'fails_at_once:f'):
        with pytest.raises(UserError, match=rf'fails_at_once\.py:{line}: rl\.reward={name}: '):
            imports.function('rl.reward', name)


def test_modules_of_the_current_folder_are_not_the_libraries(tmp_path):
    """`python -m` puts the current folder first on sys.path: a yaml.py there must not run in the library's place."""
    for name in ('yaml', 'numpy', 'absl'):
        (tmp_path / f'{name}.py').write_text('print("the wrong module ran")\n')
    (tmp_path / 'recipe.py').write_text('from ml_collections import ConfigDict\ndef get_config():\n    return 5\n')
    root = pathlib.Path(__file__).resolve().parents[2]
    made = subprocess.run(
        [sys.executable, '-m', 'jaxtune.main', '--config', 'recipe.py'],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(root)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2
    assert made.stdout == ''
    assert 'get_config() returned int' in made.stderr


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('[]', ':1: expected a JSON object'),
        ('{', ':1: not valid JSON'),
        ('[' * 100_000, 'nested less deeply'),
        ('{"a": ' + '9' * 5000 + '}', ':1: not valid JSON'),
        ('{"a": "\\ud800"}', 'surrogate'),
        ('{"n": "x"}', "n='x': expected an integer"),
        ('{"n": 1e400}', 'n=inf: expected an integer'),
    ],
)
def test_json_of_another_shape(tmp_path, text, words):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        jsonfile.read_object(path, {'n': integer(1)})
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    with pytest.raises(UserError, match='expected a file'):
        jsonfile.read_object(tmp_path)


LORA = {'peft_type': 'LORA', 'lora_alpha': 16, 'r': 4}


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'peft_type': ['LORA']}, "peft_type=['LORA']: expected a text"),
        ({'peft_type': 'LOHA'}, "peft_type='LOHA': expected one of"),
        (LORA | {'lora_alpha': None}, 'lora_alpha: no such field'),
        (LORA | {'lora_alpha': 'x'}, "lora_alpha='x': expected a number"),
        (LORA | {'alpha_pattern': 'q_proj'}, "alpha_pattern='q_proj': expected numbers by name"),
        (LORA | {'alpha_pattern': {'q_proj': 'x'}}, 'expected numbers by name'),
        (LORA | {'use_dora': 'yes'}, "use_dora='yes': expected True or False"),
        (LORA | {'lora_dropout': [0]}, 'lora_dropout=[0]: expected a number'),
        ({'peft_type': 'PROMPT_TUNING'}, 'num_virtual_tokens: no such field'),
        ({'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': 'x'}, "num_virtual_tokens='x': expected an integer"),
        (LORA | {'base_model_name_or_path': 5}, 'base_model_name_or_path=5: expected a text'),
    ],
)
def test_an_adapters_config_of_another_shape(tmp_path, fields, words):
    (tmp_path / peft.CONFIG).write_text(json.dumps(fields))
    with pytest.raises(UserError) as caught:
        peft.read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / peft.CONFIG))
    assert words in str(caught.value)


def test_values_are_shown_whatever_they_are():
    class Fails:
        def __repr__(self):
            raise RuntimeError('no')

    assert shown('a') == "'a'"
    assert len(shown('x' * 10**6)) < 300
    assert 'int' in shown(10**5000)
    assert 'Fails' in shown(Fails())


def test_lack_of_memory_is_told_from_other_ends():
    import numpy as np

    with pytest.raises(MemoryError) as caught:
        np.empty(2**55)
    assert out_of_memory(caught.value).startswith('out of memory')
    wrapped = RuntimeError('task 3 failed')
    wrapped.__cause__ = caught.value
    assert out_of_memory(wrapped).startswith('out of memory')
    assert out_of_memory(ValueError('x')) == ''


def test_what_is_held_back_is_shown_unless_it_fails(capfd):
    with stderr.held_back():
        os.write(2, b'kept\n')
    with pytest.raises(ZeroDivisionError):
        _fails_while_held()
    threads = [threading.Thread(target=_write_held, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b'after\n')
    lines = capfd.readouterr().err.split()
    assert sorted(lines) == sorted(['kept', 'after', *(f'thread-{number}' for number in range(8))])


def _fails_while_held() -> None:
    with stderr.held_back():
        os.write(2, b'dropped\n')
        raise ZeroDivisionError


def _write_held(number: int) -> None:
    with stderr.held_back():
        os.write(2, f'thread-{number}\n'.encode())


def test_a_local_path():
    assert paths.local('~', 'k') == pathlib.Path.home()
    assert paths.local('a/b', 'k') == pathlib.Path('a/b')


def test_a_recipe_that_changed_within_a_second_is_read_anew(tmp_path):
    recipe = tmp_path / 'recipe.py'
    text = 'from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({"seed": 1})\n'
    for number in (1, 2, 3):
        recipe.write_text(text.replace('1', str(number)))
        os.utime(recipe, (1, 1))
        assert recipes.read_recipe(str(recipe)).seed == number
    assert [path.name for path in tmp_path.iterdir()] == ['recipe.py']
