"""One recipe gives the same run on any mesh, in any number of micro-batches, with one trace of its step."""

import functools

import numpy as np
import pytest
from runs import OBJECTIVES, SHARING, full_config, metrics, recipe, train

from jaxtune import program

MESHES = {'data': (8, 1, 1, 1), 'fsdp': (1, 8, 1, 1), 'all': (2, 2, 2, 1), 'sequence': (2, 1, 2, 2)}


CASES = [(objective, mesh) for objective in OBJECTIVES for mesh in MESHES if mesh == 'all' or objective not in SHARING]


@pytest.fixture(scope='module')
def one_device(corpus, tmp_path_factory):
    """Objective -> the workdir of 20 updates on one device."""

    @functools.cache
    def run(objective):
        workdir = tmp_path_factory.mktemp('one')
        train(recipe(corpus, objective), workdir)
        return workdir

    return run


@pytest.mark.parametrize(('objective', 'mesh'), CASES)
def test_any_mesh_gives_the_losses_of_one_device(one_device, corpus, tmp_path, objective, mesh):
    reference = one_device(objective)
    train(recipe(corpus, objective), tmp_path, MESHES[mesh])
    expected, found = metrics(reference, 'train/loss'), metrics(tmp_path, 'train/loss')
    assert len(expected) == 20
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics(tmp_path, 'eval/loss'), metrics(reference, 'eval/loss'), rtol=1e-5)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_micro_batches_give_the_losses_of_one_batch(one_device, corpus, tmp_path, objective):
    reference = one_device(objective)
    train(recipe(corpus, objective, train__accumulate=4), tmp_path)
    np.testing.assert_allclose(metrics(tmp_path, 'train/loss'), metrics(reference, 'train/loss'), rtol=1e-6)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_one_trace_of_the_step_over_a_run_with_evaluations(corpus, tmp_path, monkeypatch, objective):
    traces = {'train': 0, 'eval': 0}

    def counting(name, make):
        def made(*args, **settings):
            function = make(*args, **settings)

            def counted(*inputs):
                traces[name] += 1
                return function(*inputs)

            return counted

        return made

    monkeypatch.setattr(program, 'make_train_step', counting('train', program.make_train_step))
    monkeypatch.setattr(program, 'make_eval_step', counting('eval', program.make_eval_step))
    train(recipe(corpus, objective, train__steps=9, eval__every=2, checkpoint__every=4), tmp_path)
    assert traces == {'train': 1, 'eval': 1}
    assert len(metrics(tmp_path, 'eval/loss')) == 5


def test_early_stopping_exports_the_best(corpus, tmp_path):
    keys = recipe(
        corpus, optimizer__lr=0.5, optimizer__clip_norm=0.0, train__steps=200, eval__every=2, eval__patience=3
    )
    result = train(keys, tmp_path)
    losses = metrics(tmp_path, 'eval/loss')
    assert result['step'] < 200
    assert result['step'] == 2 * len(losses)
    assert min(losses) not in losses[-3:]
    # Scored again from the export alone, the model is the best one, not the last.
    from jaxtune import evaluate

    config = full_config(
        {'task': 'evaluate', 'model.path': str(tmp_path), 'data.eval': keys['data.eval'], 'data.seq_len': 64}
    )
    again = evaluate.run(config, tmp_path / 'again', None if False else _command(tmp_path, config))
    assert again['metrics']['eval/loss'] == pytest.approx(min(losses), rel=1e-5)


def _command(workdir, config):
    from jaxtune.flags import Command

    return Command('recipe.py', workdir, False, {'': config}, ('jaxtune',))
