"""One recipe gives the same run on any mesh, in any number of micro-batches, with one trace of its step."""

import collections
import functools
import shutil

import numpy as np
import pytest
from runs import OBJECTIVES, exported, full_config, metrics, recipe, train

from jaxtune.training import program

MESHES = {'data': (8, 1, 1, 1), 'fsdp': (1, 8, 1, 1), 'all': (2, 2, 2, 1), 'sequence': (2, 1, 2, 2)}


# By default an objective of each kind of model runs on the mesh that has most axes, the first one on all meshes.
USUAL = (OBJECTIVES[0], 'masked_lm', 'span_corruption', 'reward')
EVERY = [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in OBJECTIVES]


def cases():
    """Every objective on every mesh."""
    for objective in OBJECTIVES:
        for mesh in MESHES:
            usual = objective == OBJECTIVES[0] or (mesh == 'all' and objective in USUAL)
            yield pytest.param(objective, mesh, marks=() if usual else pytest.mark.exhaustive)


@pytest.fixture(scope='module')
def one_device(corpus, tmp_path_factory):
    """Objective -> the workdir of 20 updates on one device, with how often its steps were traced."""

    @functools.cache
    def run(objective):
        workdir, traces = tmp_path_factory.mktemp('one'), collections.Counter()

        def counting(make):
            def made(*args, **settings):
                function = make(*args, **settings)

                def counted(*inputs):
                    traces[make.__name__] += 1
                    return function(*inputs)

                return counted

            return made

        with pytest.MonkeyPatch.context() as patch:
            for name in ('make_train_step', 'make_eval_step'):
                patch.setattr(program, name, counting(getattr(program, name)))
            train(recipe(corpus, objective, eval__every=8, checkpoint__every=15), workdir)
        return workdir, traces

    return run


@pytest.mark.parametrize(('objective', 'mesh'), cases())
def test_any_mesh_gives_the_losses_of_one_device(one_device, corpus, tmp_path, objective, mesh):
    reference, _ = one_device(objective)
    train(recipe(corpus, objective), tmp_path, MESHES[mesh])
    expected, found = metrics(reference, 'train/loss'), metrics(tmp_path, 'train/loss')
    assert len(expected) == 20
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics(tmp_path, 'eval/loss')[-1], metrics(reference, 'eval/loss')[-1], rtol=1e-5)


@pytest.mark.parametrize('objective', EVERY)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(one_device, corpus, tmp_path, objective):
    reference, _ = one_device(objective)
    # As the run stood after update 15: what came later is lost.
    shutil.copytree(reference, tmp_path / 'run')
    for later in ('checkpoints/20', 'export'):
        shutil.rmtree(tmp_path / 'run' / later)
    (tmp_path / 'run' / 'result.json').unlink()
    train(recipe(corpus, objective, eval__every=8, checkpoint__every=15), tmp_path / 'run')
    for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
        assert metrics(tmp_path / 'run', name) == metrics(reference, name)
    assert exported(tmp_path / 'run') == exported(reference)


def test_bfloat16_weights_follow_on_any_mesh_and_resume_bit_for_bit(corpus, tmp_path):
    """Rounding is a function of the update and the place, so that only sums in another order differ."""
    keys = recipe(corpus, model__param_dtype='bfloat16', train__accumulate=2, optimizer__schedule='constant')
    keys |= {'train.steps': 8, 'checkpoint.every': 4}
    train(keys, tmp_path / 'whole', MESHES['all'])
    train({**keys, 'train.steps': 4}, tmp_path / 'parts', MESHES['all'])
    train(keys, tmp_path / 'parts', MESHES['all'])
    assert metrics(tmp_path / 'parts', 'train/loss') == metrics(tmp_path / 'whole', 'train/loss')
    assert exported(tmp_path / 'parts') == exported(tmp_path / 'whole')
    train(keys, tmp_path / 'one')
    ours, theirs = (metrics(tmp_path / name, 'train/loss') for name in ('whole', 'one'))
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)


@pytest.mark.parametrize('objective', EVERY)
def test_micro_batches_give_the_losses_of_one_batch(one_device, corpus, tmp_path, objective):
    reference, _ = one_device(objective)
    train(recipe(corpus, objective, train__accumulate=4), tmp_path)
    np.testing.assert_allclose(metrics(tmp_path, 'train/loss'), metrics(reference, 'train/loss'), rtol=1e-6)


@pytest.mark.parametrize('objective', EVERY)
def test_one_trace_of_the_step_over_a_run_with_evaluations(one_device, objective):
    workdir, traces = one_device(objective)
    assert traces == {'make_train_step': 1, 'make_eval_step': 1}
    assert len(metrics(workdir, 'eval/loss')) == 3


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
    from jaxtune.tasks import evaluate

    config = full_config(
        {'task': 'evaluate', 'model.path': str(tmp_path), 'data.eval': keys['data.eval'], 'data.seq_len': 64}
    )
    (tmp_path / 'again').mkdir()
    again = evaluate.run(config, tmp_path / 'again', _command(tmp_path, config))
    assert again['metrics']['eval/loss'] == pytest.approx(min(losses), rel=1e-5)


def _command(workdir, config):
    from jaxtune.recipe.flags import Command

    return Command('recipe.py', workdir, False, {'': config}, ('jaxtune',))
