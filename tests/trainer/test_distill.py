"""Distillation through the trainer: what it learns, how it is scored and resumed, and which teachers are refused."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from runs import exported, full_config, metrics, recipe, teacher, train, write_recipe
from test_check import check

from jaxtune import main
from jaxtune.data import tokenizer as tokenizers
from jaxtune.parallel import make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.recipe.flags import Command
from jaxtune.tasks import ahead, evaluate, specs

MESH = (2, 2, 1, 1)


def score(keys, workdir):
    workdir.mkdir()
    config = full_config({**keys, 'task': 'evaluate'})
    result = evaluate.run(config, workdir, Command('recipe.py', workdir, False, {'': config}, ('jaxtune',)))
    return result['metrics']


@pytest.fixture(scope='module')
def whole(corpus, tmp_path_factory):
    """A run on a mesh with accumulation, its teacher of more rows than its student; and its workdir."""
    workdir = tmp_path_factory.mktemp('distilled')
    keys = recipe(corpus, 'distill', train__steps=8, train__accumulate=2, checkpoint__every=4, eval__by_position=2)
    keys |= {'distill.teacher': str(teacher(corpus, 'wide', vocab_size=384)), 'distill.weight': 0.75}
    train(keys, workdir, MESH)
    return keys, workdir


def test_the_student_learns_of_the_teacher_and_of_the_data(whole):
    _, workdir = whole
    loss, data, divergence = (metrics(workdir, f'train/{name}') for name in ('loss', 'data_loss', 'divergence'))
    np.testing.assert_allclose(loss, 0.25 * np.asarray(data) + 0.75 * np.asarray(divergence), rtol=1e-5)
    assert divergence[-1] < 0.9 * divergence[0]
    assert 'Divergence from the teacher' in (workdir / 'report.html').read_text()


def test_a_run_cut_off_goes_on_bit_for_bit(whole, tmp_path):
    keys, workdir = whole
    shutil.copytree(workdir, tmp_path / 'cut')
    for later in ('checkpoints/8', 'export'):
        shutil.rmtree(tmp_path / 'cut' / later)
    (tmp_path / 'cut' / 'result.json').unlink()
    train(keys, tmp_path / 'cut', MESH)
    for name in ('train/divergence', 'train/grad_norm', 'eval/divergence'):
        assert metrics(tmp_path / 'cut', name) == metrics(workdir, name)
    assert exported(tmp_path / 'cut') == exported(workdir)


def test_held_out_loss_is_that_of_the_data_and_the_divergence_is_beside_it(whole, tmp_path):
    keys, workdir = whole
    student = {'model.path': str(workdir), 'model.config': {}, 'tokenizer.path': ''}
    found = score({**keys, **student}, tmp_path / 'distill')
    plain = score({**keys, **student, 'objective': 'causal_lm'}, tmp_path / 'causal_lm')
    for name in ('eval/loss', 'eval/tokens', 'eval/accuracy', 'eval/loss_by_position/0-31'):
        assert found[name] == pytest.approx(plain[name], rel=1e-6)
    assert found['eval/divergence'] == pytest.approx(metrics(workdir, 'eval/divergence')[-1], rel=1e-4)
    itself = score({**keys, **student, 'distill.teacher': str(workdir)}, tmp_path / 'itself')
    assert abs(itself['eval/divergence']) < 1e-5


@pytest.mark.parametrize('method', [pytest.param('lora', marks=pytest.mark.exhaustive), 'qlora'])
def test_adapters_learn_of_conversations_the_answers(corpus, tmp_path, method):
    """A model is its own teacher: with the adapter at its start, the divergence of the trained tokens is 0."""
    model = teacher(corpus, 'itself', initializer_range=0.1)
    keys = recipe(corpus, 'distill', train__steps=2, data__format='prompt', method__name=method, method__rank=4)
    keys |= {'model.path': str(model), 'model.config': {}, 'tokenizer.path': '', 'distill.teacher': str(model)}
    result = train({**keys, 'distill.beta': 1.0, 'method.block_size': 16}, tmp_path)
    first = metrics(tmp_path, 'train/divergence')[0]
    assert abs(first) < 1e-5 if method == 'lora' else 1e-4 < first < 0.5  # of four bits, what was lost by them
    rows = specs.objective(full_config(recipe(corpus, 'sft'))).dataset('eval', tokenizers.load('bytes'), tmp_path)
    assert result['metrics']['eval/tokens'] == sum(rows[i]['loss_mask'].sum() for i in range(len(rows)))
    assert (tmp_path / 'adapter' / 'adapter_config.json').is_file()
    assert result['metrics']['eval/exact_match'] >= 0


def test_another_trained_token_is_refused_with_its_number_before_weights(corpus, tmp_path, capsys):
    other = teacher(corpus, 'other')
    tokenizer = tokenizers.train_bpe(['the quick brown fox'] * 9, 300)
    tokenizer.save_pretrained(str(other))
    (other / 'model.safetensors').write_bytes(b'not read')
    assert check(tmp_path, recipe(corpus, 'distill', distill__teacher=str(other))) == 2
    error = capsys.readouterr().err
    assert f'distill.teacher={other}: has another tokenizer' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    ('named', 'said'),
    [
        ('', "distill.teacher='': expected a folder"),
        ('gone/teacher', 'distill.teacher=gone/teacher'),
        ('bert', 'is a bert; expected a model that predicts the next token'),
    ],
)
@pytest.mark.parametrize('task', ['train', 'evaluate'])
def test_teachers_that_are_none_are_refused_in_a_line(corpus, tmp_path, capsys, task, named, said):
    if named == 'bert':
        named = tmp_path / 'bert'
        named.mkdir()
        (named / 'config.json').write_text(json.dumps({'model_type': 'bert', 'vocab_size': 320}))
    path = write_recipe(tmp_path / 'recipe.py', {**recipe(corpus, 'distill'), 'distill.teacher': str(named)})
    words = ['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run'), f'--config.task={task}']
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count('\n') == 1


def test_what_is_compiled_ahead_holds_the_teacher(corpus):
    """Its bytes are arguments of the step; of a folder its `config.json` is enough."""
    keys = {**recipe(corpus, 'distill'), 'task': 'compile', 'tokenizer.path': ''}
    keys['model.config'] = {**keys['model.config'], 'vocab_size': 320}
    found = {}
    for objective in ('distill', 'causal_lm'):
        config = full_config({**keys, 'objective': objective})
        mesh = make_mesh({'data': 1, 'fsdp': 2}, jax.devices()[:2])
        step = ahead.open_step(config, mesh, 2**40)
        found[objective] = step.least_bytes(), step.flops()
    with jax.set_mesh(mesh):
        spec = specs.other_model_spec(config, 'distill.teacher', keys['distill.teacher'])
        shapes = load_model(spec, mesh, weights=False).params
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert found['distill'][0] - found['causal_lm'][0] == sum(sizes)
    assert found['distill'][1] > found['causal_lm'][1]


def test_an_earlier_stage_may_be_the_teacher(corpus):
    config = full_config({**recipe(corpus, 'distill'), 'distill.teacher': '@large'})
    assert recipes.references(config) == {'large'}
