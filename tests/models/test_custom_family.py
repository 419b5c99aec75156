"""A family of one's own, in a package outside the repository, from training to the export that loads again."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune import main, models
from jaxtune.errors import UserError
from jaxtune.models.safetensors import read_header

FAMILY = 'own_models.llama:FAMILY'
STEPS = 60

# Llama, but for the name of the norm's epsilon and the names of its tensors.
SOURCE = """
from jaxtune.models import Family
from jaxtune.models.decoder_config import LLAMA_MODULES, llama_like

FIELDS = {
    'vocab_size': 512, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 128, 'hidden_act': 'silu', 'norm_eps': 1e-5,
    'initializer_range': 0.02, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
}


def config(fields):
    return llama_like({**fields, 'rms_norm_eps': fields['norm_eps']})


MODULES = {ours: theirs.replace('.layers.', '.blocks.') for ours, theirs in LLAMA_MODULES.items()}
FAMILY = Family('own_llama', 'decoder', config, 'OwnLlamaForCausalLM', MODULES, fields=FIELDS)
MISSING = Family('unheard_of', 'decoder', config, 'OwnLlamaForCausalLM', MODULES)
SOMETHING = 3
"""

RECIPE = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.family = 'own_models.llama:FAMILY'
    config.model.config = ConfigDict({'hidden_size': 32, 'intermediate_size': 64, 'norm_eps': 1e-3})
    config.tokenizer = ConfigDict({'path': 'bytes'})
    config.data = ConfigDict({'train': 'train.jsonl', 'eval': 'eval.jsonl', 'seq_len': 32})
    config.train = ConfigDict({'steps': STEPS, 'batch_size': 8, 'accumulate': 1})
    config.optimizer = ConfigDict({'lr': 1e-2})
    config.checkpoint = ConfigDict({'every': 7})
    config.log = ConfigDict({'every': 1})
    return config
"""


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with the package, the recipe and the data."""
    folder = tmp_path_factory.mktemp('own')
    (folder / 'own_models').mkdir()
    (folder / 'own_models' / '__init__.py').touch()
    (folder / 'own_models' / 'llama.py').write_text(SOURCE)
    (folder / 'recipe.py').write_text(RECIPE.replace('STEPS', str(STEPS)))
    rng, words = np.random.default_rng(0), ('the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog')
    for name, count in (('train', 60), ('eval', 8)):
        lines = (json.dumps({'text': ' '.join(rng.choice(words, 20))}) for _ in range(count))
        (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope='module')
def trained(place) -> pathlib.Path:
    """The workdir of an uninterrupted run."""
    before = os.getcwd()
    os.chdir(place)
    try:
        assert run('--workdir=whole') == 0
    finally:
        os.chdir(before)
    return place / 'whole'


def run(*words: str, recipe: str = 'recipe.py') -> int:
    return main.main(['jaxtune', f'--config={recipe}', *words])


def losses(workdir: pathlib.Path) -> list[float]:
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [line['train/loss'] for line in lines if 'train/loss' in line]


def exported(workdir: pathlib.Path) -> dict[str, bytes]:
    return {name: entry.read().tobytes() for name, entry in read_header(workdir / 'export/model.safetensors').items()}


def test_it_trains_reports_and_exports_under_its_own_names(trained):
    assert np.mean(losses(trained)[-5:]) < 0.7 * np.mean(losses(trained)[:5])
    assert 'own_llama' in (trained / 'report.html').read_text()
    config = json.loads((trained / 'export' / 'config.json').read_text())
    assert config['model_type'] == 'own_llama'
    assert config['architectures'] == ['OwnLlamaForCausalLM']
    assert (config['norm_eps'], config['hidden_size'], config['num_key_value_heads']) == (1e-3, 32, 2)
    assert {'model.blocks.1.self_attn.q_proj.weight', 'lm_head.weight'} <= set(exported(trained))


def test_a_stopped_run_ends_with_the_same_weights(place, trained):
    environment = os.environ | {'PYTHONPATH': str(pathlib.Path(jaxtune.__file__).parents[1])}
    command = [sys.executable, '-m', 'jaxtune.main', '--config', 'recipe.py', '--workdir', 'stopped']
    process = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline, log = time.monotonic() + 240, place / 'stopped' / 'metrics.jsonl'
    while not (log.exists() and log.read_bytes().count(b'"train/loss"') >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors

    assert run('--workdir=stopped') == 0
    assert losses(place / 'stopped') == losses(trained)
    assert exported(place / 'stopped') == exported(trained)


def test_its_export_loads_again_by_the_same_key(trained, place, capfd):
    lines = [line for line in RECIPE.replace('STEPS', '1').splitlines() if 'model.config' not in line]
    pathlib.Path('again.py').write_text('\n'.join(lines))
    words = ('--config.task=evaluate', '--config.model.path=whole', '--config.tokenizer.path=')
    assert run('--workdir=again', *words, recipe='again.py') == 0
    again, before = (json.loads((place / name / 'result.json').read_text())['metrics'] for name in ('again', 'whole'))
    np.testing.assert_allclose(again['eval/loss'], before['eval/loss'], rtol=1e-5)
    capfd.readouterr()

    assert run('--workdir=without', *words, '--config.model.family=', recipe='again.py') == 2
    _, error = capfd.readouterr()
    assert "config.json: model_type='own_llama': expected one of llama, " in error
    assert 'model.family=module:NAME' in error


def test_it_is_llama_by_other_names():
    fields = {'hidden_size': 32, 'norm_eps': 1e-3, 'initializer_range': 0.2}
    own = models.build(models.read_config(fields, FAMILY), family=FAMILY)
    fields = {name: value for name, value in own.hf_config.items() if name != 'norm_eps'}
    llama = models.read_config(fields | {'model_type': 'llama', 'rms_norm_eps': 1e-3})
    params = own.init(jax.random.key(0))
    tokens = np.arange(10)[None]
    ours, theirs = (model.apply(params, {'tokens': tokens}).hidden for model in (own, models.build(llama)))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ('fields', 'family', 'message'),
    [
        ({'norm_epsilon': 1e-3}, FAMILY, r'model\.config\.norm_epsilon: unknown key .* model\.config\.norm_eps'),
        ({'norm_eps': 'small'}, FAMILY, r"model\.config\.norm_eps='small': expected a number"),
        ({'hidden_size': 0}, FAMILY, r'model\.config\.hidden_size=0: expected an integer >= 1'),
        ({'model_type': 'llama'}, FAMILY, r"model_type='llama': expected 'own_llama', that of model\.family="),
        ({'model_type': 'own_llama'}, '', r"model_type='own_llama': expected one of .*model\.family=module:NAME"),
        ({}, 'own_models.llama:SOMETHING', r'model\.family=.*: expected a jaxtune Family, found int'),
        ({}, 'own_models.llama:NOTHING', r'model\.family=.*: expected module:'),
        (
            {},
            'own_models.llama:MISSING',
            r'transformers knows no model_type=unheard_of; expected a Family with `fields`',
        ),
    ],
)
def test_what_is_wrong_is_named(fields, family, message):
    with pytest.raises(UserError, match=message):
        models.read_config(fields, family)


def test_every_shipped_family_has_its_own_name():
    assert {name: family.model_type for name, family in models.families().items()} == {
        name: name for name in models.FAMILIES.names
    }
