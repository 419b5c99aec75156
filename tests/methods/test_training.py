"""Every method through the trainer: what it leaves, that it resumes, and that what it left is what it scored."""

import json
import pathlib
import random
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'trainer'))

from runs import SENTENCE, full_config, metrics, recipe, train

from jaxtune.errors import UserError
from jaxtune.models.safetensors import read_header
from jaxtune.recipe.flags import Command
from jaxtune.tasks import evaluate, export, generate, specs

METHODS = {
    'lora': {'method.rank': 4, 'method.dropout': 0.1, 'method.lr_ratio': 4.0},
    'qlora': {'method.rank': 4, 'method.dora': True, 'optimizer.name': 'adamw8bit', 'optimizer.offload': True},
    'adapter': {'method.bottleneck': 8},
    'prompt': {'method.virtual_tokens': 4, 'method.init_text': 'the lazy dog', 'optimizer.lr': 3e-2},
    'prefix': {'method.virtual_tokens': 4, 'method.init_text': 'the lazy dog', 'method.prefix': True},
}
UNMERGED = ('adapter', 'prompt', 'prefix')


def keys_of(corpus, method, objective='causal_lm'):
    keys = recipe(corpus, objective, optimizer__schedule='constant', train__steps=9, checkpoint__every=4)
    if objective != 'causal_lm':
        keys['data.packing'] = False  # one text a row: what an encoder reads with a prompt
    return keys | {'method.name': 'prompt' if method == 'prefix' else method, **METHODS[method]}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('corpus')
    rng, vocabulary = random.Random(0), SENTENCE.split()
    for name, documents in (('train', 40), ('eval', 6)):
        texts = [' '.join(rng.choice(vocabulary) for _ in range(30)) for _ in range(documents)]
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return folder


def tensors(folder):
    return {name: entry.read().tobytes() for name, entry in read_header(next(folder.glob('*.safetensors'))).items()}


def run(task, workdir, **keys):
    config = full_config({'task': task.__name__.rsplit('.', 1)[-1], 'data.seq_len': 64, 'mesh.data': 8, **keys})
    workdir.mkdir(parents=True, exist_ok=True)
    return task.run(config, workdir, Command('recipe.py', workdir, False, {'': config}, ('jaxtune',)))


@pytest.fixture(scope='module', params=METHODS)
def trained(request, corpus, tmp_path_factory):
    """`(method, keys, workdir)` of a run of 9 updates."""
    keys = keys_of(corpus, request.param)
    workdir = tmp_path_factory.mktemp(request.param)
    result = train(keys, workdir)
    assert result['metrics']['eval/loss'] < metrics(workdir, 'train/loss')[0]
    return request.param, keys, workdir


def test_a_resumed_run_ends_the_same(trained, tmp_path):
    _, keys, whole = trained
    train({**keys, 'train.steps': 4}, tmp_path)
    train(keys, tmp_path)
    assert metrics(tmp_path, 'train/loss') == metrics(whole, 'train/loss')
    assert tensors(tmp_path / 'adapter') == tensors(whole / 'adapter')


@pytest.mark.exhaustive
@pytest.mark.parametrize('objective', ['masked_lm', 'seq2seq'])
@pytest.mark.parametrize('method', METHODS)
def test_a_resumed_run_ends_the_same_on_other_kinds_of_models(method, objective, corpus, tmp_path):
    keys = keys_of(corpus, method, objective)
    train(keys, tmp_path / 'whole')
    train({**keys, 'train.steps': 4}, tmp_path / 'parts')
    train(keys, tmp_path / 'parts')
    assert metrics(tmp_path / 'parts', 'train/loss') == metrics(tmp_path / 'whole', 'train/loss')
    assert tensors(tmp_path / 'parts' / 'adapter') == tensors(tmp_path / 'whole' / 'adapter')


@pytest.mark.parametrize('objective', ['masked_lm', 'seq2seq'])
def test_a_prompt_that_sees_its_text_refuses_rows_of_several(objective, corpus, tmp_path):
    keys = keys_of(corpus, 'prompt', objective) | {'data.packing': True}
    with pytest.raises(UserError, match=r'data.packing=True.*expected False'):
        train(keys, tmp_path)
    train(keys | {'method.prefix': True, 'train.steps': 1}, tmp_path)


def test_what_it_left_scores_as_in_training(trained, corpus, tmp_path):
    method, _, workdir = trained
    info = json.loads((workdir / 'run.json').read_text())['model']
    assert info['trainable'] < 0.3 * info['parameters']
    scored = metrics(workdir, 'eval/loss')[-1]
    data = {'data.eval': str(corpus / 'eval.jsonl')}
    assert run(evaluate, tmp_path / 'a', **data, **{'model.path': str(workdir)})['metrics']['eval/loss'] == (
        pytest.approx(scored, rel=1e-5)
    )
    if method in UNMERGED:
        assert not (workdir / 'export').exists()
        with pytest.raises(UserError, match='cannot be merged'):
            run(export, tmp_path / 'b', **{'model.path': str(workdir)})
        return
    # The adapter beside its base, and the base alone.
    base = {'model.path': str(workdir / 'base'), **data}
    if method == 'lora':
        found = run(evaluate, tmp_path / 'c', **base, **{'method.path': str(workdir)})['metrics']['eval/loss']
        assert found == pytest.approx(scored, rel=1e-5)
        run(export, tmp_path / 'd', **{'model.path': str(workdir / 'adapter')})
        again, merged = tensors(tmp_path / 'd' / 'export'), tensors(workdir / 'export')
        for name, value in merged.items():
            values = (np.frombuffer(part, np.float32) for part in (again[name], value))
            np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6)
    assert run(evaluate, tmp_path / 'e', **base)['metrics']['eval/loss'] > scored


def test_a_prompt_is_there_when_it_writes(trained, corpus, tmp_path):
    method, _, workdir = trained
    if method not in ('prompt', 'prefix'):
        pytest.skip('for prompts only: all else changes no cache')
    keys = {
        'model.path': str(workdir), 'data.eval': str(corpus / 'eval.jsonl'), 'generate.prompt_tokens': 8,
        'generate.max_new_tokens': 6, 'generate.temperature': 0.0, 'generate.prompts': 2,
    }  # fmt: skip
    run(generate, tmp_path, **keys)
    lines = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    # The same greedy tokens without a cache.
    import jax.numpy as jnp

    from jaxtune.parallel import make_mesh
    from jaxtune.pretrained.load import load_model

    config = full_config({'task': 'generate', **keys})
    parts = load_model(specs.model_spec(config), make_mesh(config.mesh))
    for line in lines:
        ids = list(parts.tokenizer(line['prompt']).input_ids)
        for _ in range(6):
            hidden = parts.model.apply(parts.params, {'tokens': jnp.asarray([ids], jnp.int32)}).hidden
            ids.append(int(parts.model.logits(parts.params, hidden[:, -1]).argmax()))
        assert parts.tokenizer.decode(ids[8:], skip_special_tokens=True) == line['completion']


def test_a_method_s_own_adapter_goes_on_and_another_s_is_refused(trained, corpus, tmp_path):
    method, keys, workdir = trained
    if method != 'lora':
        pytest.skip('one is enough')
    changes = {'model.path': str(workdir / 'base'), 'method.path': str(workdir), 'train.steps': 2}
    on = {name: value for name, value in keys.items() if name not in ('model.config', 'tokenizer.path')} | changes
    train(on, tmp_path / 'on')
    assert metrics(tmp_path / 'on', 'train/loss')[0] < metrics(workdir, 'train/loss')[0] - 0.1
    with pytest.raises(UserError, match=r'method\.name=prompt'):
        train({**on, 'method.name': 'prompt'}, tmp_path / 'off')


def test_requantising_after_the_merge_says_what_it_costs(trained, corpus, tmp_path):
    method, _, workdir = trained
    if method != 'qlora':
        pytest.skip('for four bits only')
    asked = {'model.path': str(workdir), 'export.requantise': True}
    with pytest.raises(UserError, match=r'data\.eval.*export\.requantise=True needs held-out data'):
        run(export, tmp_path / 'a', **asked)
    found = run(export, tmp_path / 'b', **asked, **{'data.eval': str(corpus / 'eval.jsonl')})['metrics']
    scored = metrics(workdir, 'eval/loss')[-1]
    assert found['export/loss_merged'] == pytest.approx(scored, rel=1e-5)
    data = {'model.path': str(tmp_path / 'b'), 'data.eval': str(corpus / 'eval.jsonl')}
    again = run(evaluate, tmp_path / 'c', **data)['metrics']['eval/loss']
    assert again == pytest.approx(found['export/loss_requantised'], rel=1e-5)
    assert abs(again - scored) > 1e-6
    merged, rounded = tensors(workdir / 'export'), tensors(tmp_path / 'b' / 'export')
    changed = {name for name in merged if merged[name] != rounded[name]}
    assert changed
    assert all(name.endswith('proj.weight') for name in changed)


def test_several_adapters_write_from_one_base(trained, corpus, tmp_path):
    method, keys, workdir = trained
    if method != 'lora':
        pytest.skip('one is enough')
    base = str(workdir / 'base')
    of_base = {name: value for name, value in keys.items() if name not in ('model.config', 'tokenizer.path')}
    (tmp_path / 'sevens.jsonl').write_text((json.dumps({'text': '7' * 60}) + '\n') * 40)
    other = tmp_path / 'other'
    train(
        {
            **of_base,
            'model.path': base,
            'data.train': str(tmp_path / 'sevens.jsonl'),
            'train.steps': 6,
            'method.rank': 2,
            'optimizer.warmup_steps': 0,
            'optimizer.lr': 0.1,
        },
        other,
    )
    asked = {
        'model.path': base, 'data.eval': str(corpus / 'eval.jsonl'), 'generate.prompt_tokens': 8,
        'generate.max_new_tokens': 24, 'generate.prompts': 3,
        'generate.temperature': 0.0,  # of so small a model a sample says more of its seed than of the weights
    }  # fmt: skip

    def written(name, paths):
        run(generate, tmp_path / name, **asked, **{'method.path': paths})
        lines = (tmp_path / name / 'samples.jsonl').read_text().splitlines()
        return [(line.get('adapter'), line['completion']) for line in map(json.loads, lines)]

    first, second = (written(name, str(path)) for name, path in (('first', workdir), ('second', other)))
    both = written('both', f'{workdir},{other}')
    assert both == [(str(workdir), text) for _, text in first] + [(str(other), text) for _, text in second]
    assert not any('7' in text for _, text in first)
    assert all('7' in text for _, text in second), second
    with pytest.raises(UserError, match='expected one adapter'):
        train({**of_base, 'model.path': base, 'method.path': f'{workdir},{other}'}, tmp_path / 'refused')
