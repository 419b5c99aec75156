"""Added tokens through the trainer: old rows stay, new ones train; what is left loads in `transformers` and PEFT."""

import json
import pathlib
import signal
import sys
import time

import numpy as np
import pytest
from added_tokens import (
    NAMES,
    ROWS,
    bundle_of,
    by_end,
    ids_of,
    keys_of,
    logits,
    rows_of,
    run,
    tensors,
    torch_base,
    torch_logits,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'trainer'))

from runs import exported, metrics, start, train, write_recipe

from jaxtune.methods import peft
from jaxtune.models.model import leaf_paths
from jaxtune.tasks import evaluate, export, generate
from jaxtune.weights import NewRows

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')
torch.set_num_threads(1)

CASES = [('tied', 'lora'), ('untied', 'lora'), ('bert', 'lora'), ('tied', 'qlora')]
MORE = [('padded', 'lora'), ('t5', 'lora'), ('padded bert', 'lora'), ('untied', 'full'), ('bert', 'full')]
CASES += [pytest.param(case, marks=pytest.mark.exhaustive) for case in (*MORE, ('untied', 'adapter'))]


@pytest.fixture(scope='module', params=CASES, ids=lambda case: '-'.join(case).replace(' ', '_'))
def trained(request, token_bases, token_texts, tmp_path_factory):
    """`(kind, method, keys, workdir)` of a run that ended."""
    kind, method = request.param
    keys, workdir = keys_of(token_bases, token_texts, kind, method), tmp_path_factory.mktemp(f'{kind}-{method}')
    train(keys, workdir)
    return kind, method, keys, workdir


def test_old_rows_stay_and_new_ones_learn(trained, token_bases):
    kind, method, _, workdir = trained
    losses = metrics(workdir, 'train/loss')
    assert losses[-1] < losses[0]
    if method == 'adapter':
        assert not (workdir / 'export').exists()
        before, after = tensors(token_bases(kind)), tensors(workdir / 'adapter')
        rows = [value for name, value in after.items() if name.endswith('token_adapter.trainable_tokens_delta')]
        assert [value.shape for value in rows] == [(8, 32), (8, 32)]
        starts = [before[name][:ROWS].mean(0) for name in ('lm_head.weight', 'model.embed_tokens.weight')]
        assert all((np.abs(new - start).max(1) > 1e-3).all() for new, start in zip(rows, starts, strict=True))
        return
    before, after = tensors(token_bases(kind)), tensors(workdir / 'export')
    tables = [name for name, value in after.items() if value.shape == (rows_of(kind), 32)]
    assert len(tables) == 1 + (kind == 'untied')
    for name in tables:
        was, now = by_end(before, name), after[name]
        new = now[ROWS : ROWS + len(NAMES)]
        assert (np.abs(new - was[:ROWS].mean(0)).max(1) > 1e-3).all()
        if method == 'full':
            assert not np.array_equal(now[:ROWS], was[:ROWS])
            continue
        assert now[:ROWS].tobytes() == was[:ROWS].tobytes()
        assert now[ROWS + len(NAMES) :].tobytes() == was[ROWS + len(NAMES) :].tobytes()
    if 'bert' in kind and method == 'lora':  # a bias does not train, and what it begins as is the old one's mean
        was, now = (by_end(values, 'predictions.bias') for values in (before, after))
        assert now[:ROWS].tobytes() == was[:ROWS].tobytes()
        np.testing.assert_allclose(now[ROWS : ROWS + len(NAMES)], was[:ROWS].mean(), rtol=1e-5)


def test_the_export_loads_in_transformers_with_equal_logits(trained):
    kind, method, _, workdir = trained
    if method == 'adapter':
        pytest.skip('not merged')
    ours = bundle_of(**{'model.path': str(workdir)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / 'export')
    ids = ids_of(tokenizer)
    assert ids_of(ours.tokenizer).tolist() == ids.tolist()
    assert {ROWS, ROWS + 7, ROWS + 3, ROWS + 5} < set(ids[0].tolist())
    model = torch_base(workdir / 'export', kind)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == rows_of(kind)
    np.testing.assert_allclose(torch_logits(model, ids), logits(ours, ids), rtol=1e-4, atol=1e-4)


def test_the_adapter_is_read_here_and_in_peft(trained, token_bases, tmp_path):
    kind, method, keys, workdir = trained
    if method == 'full':
        pytest.skip('has none')
    # Nothing names the tokens: the adapter and the tokenizer beside it tell.
    ours = bundle_of(**{'model.path': str(workdir / 'adapter')})
    again = bundle_of(**{'model.path': keys['model.path'], 'method.path': str(workdir)})
    ids = ids_of(ours.tokenizer)
    found = logits(ours, ids)
    assert found.shape[-1] == rows_of(kind)
    np.testing.assert_array_equal(logits(again, ids), found)
    if method == 'adapter':
        return
    if method == 'lora':
        merged = bundle_of(**{'model.path': str(workdir)})
        np.testing.assert_allclose(found, logits(merged, ids), rtol=1e-4, atol=1e-4)
        run(export, tmp_path, **{'model.path': str(workdir / 'adapter')})
        for name, value in tensors(tmp_path / 'export').items():
            np.testing.assert_allclose(value, tensors(workdir / 'export')[name], rtol=1e-5, atol=1e-6)
    if method == 'qlora' or 'bert' in kind:
        return  # on a base of 32 bits here; and PEFT leaves out the bias of a head that it wraps
    text = (workdir / 'adapter' / 'README.md').read_text()
    line = f'model.resize_token_embeddings({rows_of(kind)})'
    assert (line in text) == (kind != 'padded')
    base = torch_base(token_bases(kind), kind, None if kind == 'padded' else rows_of(kind))
    theirs_ = theirs.PeftModel.from_pretrained(base, workdir / 'adapter')
    np.testing.assert_allclose(torch_logits(theirs_, ids), found, rtol=1e-4, atol=1e-4)


def test_evaluating_and_writing_need_no_key(trained, token_texts, tmp_path):
    kind, method, keys, workdir = trained
    scored = metrics(workdir, 'eval/loss')[-1]
    same = ('objective', 'data.eval', 'data.seq_len', 'data.source_key', 'data.target_key', 'data.target_len')
    data = {name: keys[name] for name in same if name in keys} | {'eval.batch_size': 16}
    found = run(evaluate, tmp_path / 'a', **data, **{'model.path': str(workdir)})['metrics']['eval/loss']
    assert found == pytest.approx(scored, rel=1e-4)
    if method in ('lora', 'adapter'):
        asked = {'model.path': keys['model.path'], 'method.path': str(workdir / 'adapter')}
        found = run(evaluate, tmp_path / 'b', **data, **asked)['metrics']['eval/loss']
        assert found == pytest.approx(scored, rel=1e-4)
    if 'bert' in kind:
        return
    asked = {'generate.max_new_tokens': 8, 'generate.prompts': 2, 'generate.temperature': 0.0}
    asked |= {'data.eval': str(token_texts / 'eval.jsonl')}
    asked |= {'generate.prompt_tokens': 12} if kind != 't5' else {'data.source_key': 'text', 'data.target_key': 'text'}
    run(generate, tmp_path / 'c', **{'model.path': str(workdir)}, **asked)
    lines = [json.loads(line) for line in (tmp_path / 'c' / 'samples.jsonl').read_text().splitlines()]
    assert len(lines) == 2


def test_an_adapter_goes_on_with_its_rows_and_gets_further_ones(trained, token_bases, token_texts, tmp_path):
    kind, method, keys, workdir = trained
    if (kind, method) not in (('tied', 'lora'), ('padded', 'lora'), ('untied', 'adapter')):
        pytest.skip('one of each is enough')
    begun = bundle_of('train', **keys | {'method.path': str(workdir), 'tokenizer.add': (('<more>', NAMES[2]),)})
    rows = {path: leaf for path, leaf in leaf_paths(begun.params).items() if isinstance(leaf, NewRows)}
    saved = leaf_paths(bundle_of(**{'model.path': str(workdir / 'adapter')}).params)
    for path, leaf in rows.items():
        assert leaf.ids == tuple(range(ROWS, ROWS + len(NAMES) + 1))
        np.testing.assert_array_equal(leaf.rows[:8], saved[path].rows)
    losses = metrics(workdir, 'train/loss')
    train(keys | {'method.path': str(workdir), 'train.steps': 2}, tmp_path)
    assert metrics(tmp_path, 'train/loss')[0] < losses[0] - 0.3


def test_eight_devices_train_as_one(trained, tmp_path):
    kind, method, keys, workdir = trained
    if kind not in ('tied', 'untied') or method != 'lora':
        pytest.skip('of a tied and an untied model')
    train(keys, tmp_path / 'eight', (1, 2, 2, 2))
    for name in ('train/loss', 'eval/loss'):
        np.testing.assert_allclose(metrics(tmp_path / 'eight', name), metrics(workdir, name), rtol=1e-4)
    one, eight = (tensors(folder / 'adapter') for folder in (workdir, tmp_path / 'eight'))
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize('kind', ['tied', pytest.param('untied', marks=pytest.mark.exhaustive)])
def test_a_killed_run_ends_with_the_same_bytes(kind, token_bases, token_texts, tmp_path):
    keys = keys_of(token_bases, token_texts, kind, 'lora', **{'train.steps': 40, 'checkpoint.every': 5})
    path = write_recipe(tmp_path / 'recipe.py', keys)

    def ended(workdir):
        process = start(path, workdir)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors

    ended(tmp_path / 'whole')
    killed = start(path, tmp_path / 'killed')
    while not any(path.name.isdigit() for path in (tmp_path / 'killed' / 'checkpoints').glob('*')):  # whole ones
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / 'killed' / 'result.json').exists()
    run(export, tmp_path / 'early', **{'model.path': str(tmp_path / 'killed')})  # of its newest checkpoint
    assert json.loads((tmp_path / 'early' / 'export' / 'config.json').read_text())['vocab_size'] == ROWS + len(NAMES)
    ended(tmp_path / 'killed')
    assert exported(tmp_path / 'killed') == exported(tmp_path / 'whole')
    one, other = ((tmp_path / name / 'adapter' / peft.WEIGHTS).read_bytes() for name in ('whole', 'killed'))
    assert one == other
    assert metrics(tmp_path / 'killed', 'train/loss') == metrics(tmp_path / 'whole', 'train/loss')
