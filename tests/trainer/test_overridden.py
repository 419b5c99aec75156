"""Runs on a model whose config the recipe overrides: what they train is what they export, resume and serve."""

import json

import jax
import numpy as np
import pytest
from runs import recipe, write_recipe

from jaxtune import main
from jaxtune.parallel import make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.tasks import specs

YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 128}
FIELDS = {'max_position_embeddings': 512, 'rope_scaling': YARN}
TOKENS = np.random.default_rng(0).integers(3, 259, (2, 300)).astype(np.int32)


def run(folder, workdir, keys, *flags):
    path = write_recipe(folder / 'recipe.py', keys)
    return main.main(['jaxtune', '--config', str(path), '--workdir', str(workdir), *flags])


def tuning(corpus, model, **changes):
    keys = recipe(corpus, train__steps=4, data__seq_len=256, train__batch_size=8, **changes)
    return keys | {'model.path': str(model), 'model.config': FIELDS, 'tokenizer.path': ''}


def evaluated(folder, name, corpus, **keys):
    """Held-out metrics of a model by `task=evaluate`."""
    known = {'task': 'evaluate', 'data.eval': str(corpus / 'eval.jsonl'), 'data.seq_len': 256, 'train.batch_size': 8}
    assert run(folder, folder / name, known | keys) == 0
    return json.loads((folder / name / 'result.json').read_text())['metrics']


def logits(path, **keys):
    config = recipes.defaults()
    recipes.apply_overrides(config, {'task': 'generate', 'model.path': str(path), **keys})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        bundle = load_model(specs.model_spec(config), mesh)
        hidden = bundle.model.apply(bundle.params, {'tokens': TOKENS}).hidden
        return np.asarray(bundle.model.logits(bundle.params, hidden))


def test_a_tuned_model_is_exported_as_it_was_trained(model, corpus, tmp_path, capsys):
    keys, workdir = tuning(corpus, model), tmp_path / 'run'
    # Without the longer positions the rows are refused.
    assert run(tmp_path, workdir, keys | {'model.config': {}}, '--check') == 2
    assert 'data.seq_len=256' in capsys.readouterr().err
    assert run(tmp_path, workdir, keys, '--check') == 0
    assert run(tmp_path, workdir, keys) == 0
    said = capsys.readouterr().out
    assert 'model.config: ' in said
    assert 'max_position_embeddings: 128 -> 512' in said
    stored = json.loads((workdir / 'export' / 'config.json').read_text())
    assert stored['max_position_embeddings'] == 512
    assert {name: stored['rope_parameters'][name] for name in YARN} == YARN
    assert {name: stored['rope_scaling'][name] for name in YARN} == YARN  # for older readers
    transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workdir / 'export')
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(workdir), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # The same command has nothing left to do, with other fields it is another recipe.
    assert run(tmp_path, workdir, keys) == 0
    assert run(tmp_path, workdir, keys | {'model.config': {**FIELDS, 'rope_theta': 5.0}}) == 2
    assert 'model.config' in capsys.readouterr().err


def test_an_adapter_brings_the_fields_of_its_base(model, corpus, tmp_path):
    workdir = tmp_path / 'run'
    assert run(tmp_path, workdir, tuning(corpus, model, method__name='lora', method__rank=2)) == 0
    kept = json.loads((workdir / 'adapter' / 'base_config.json').read_text())
    assert kept == {
        'max_position_embeddings': 512,
        'rope_parameters': {**YARN, 'rope_theta': 10000.0},
    }
    whole = evaluated(tmp_path, 'whole', corpus, **{'model.path': str(workdir)})
    beside = {'model.path': str(model), 'method.path': str(workdir)}
    apart = evaluated(tmp_path, 'apart', corpus, **beside)
    assert apart['eval/loss'] == pytest.approx(whole['eval/loss'], rel=1e-5)
    assert evaluated(tmp_path, 'said', corpus, **beside, **{'model.config': FIELDS}) == pytest.approx(apart, rel=0.1)
    # What the recipe says lies over what the adapter brings.
    other = logits(model, **{'method.path': str(workdir), 'model.config': {'rope_theta': 5.0}})
    assert np.abs(other - logits(workdir)).max() > 1e-3

    theirs, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, **kept)
    with torch.no_grad():
        expected = theirs.PeftModel.from_pretrained(base, workdir / 'adapter')(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(workdir), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_an_adapter_that_cannot_be_merged_is_served_and_tuned_on_with_them(model, corpus, tmp_path):
    keys = tuning(corpus, model, method__name='prompt', method__virtual_tokens=2, data__packing=False)
    assert run(tmp_path, tmp_path / 'first', keys) == 0
    assert not (tmp_path / 'first' / 'export').exists()
    served = {'model.path': str(tmp_path / 'first')}
    loss = evaluated(tmp_path, 'scored', corpus, **served, **{'data.packing': False})['eval/loss']
    trained = json.loads((tmp_path / 'first' / 'result.json').read_text())['metrics']['eval/loss']
    assert loss == pytest.approx(trained, rel=1e-5)
    on = keys | {'method.path': str(tmp_path / 'first'), 'model.config': {}}
    assert run(tmp_path, tmp_path / 'second', on) == 0
    first, second = (tmp_path / name / 'adapter' / 'base_config.json' for name in ('first', 'second'))
    assert first.read_text() == second.read_text()


def test_a_stopped_run_is_exported_with_them(model, corpus, tmp_path):
    keys = tuning(corpus, model, checkpoint__every=2)
    assert run(tmp_path, tmp_path / 'run', keys) == 0
    whole = logits(tmp_path / 'run')
    for path in sorted((tmp_path / 'run' / 'export').iterdir()):
        path.unlink()
    assert run(tmp_path, tmp_path / 'out', {'task': 'export', 'model.path': str(tmp_path / 'run')}) == 0
    np.testing.assert_array_equal(logits(tmp_path / 'out'), whole)
