"""Mixtures through the trainer: killed, on two hosts, held-out loss by label, formats beside each other."""

import json
import random
import signal

import jax
import numpy as np
import pytest
from runs import OBJECTIVES, SENTENCE, exported, full_config, metrics, recipe, start, train, write_recipe
from test_check import check
from test_pod import finish, start_pod
from test_resume import updates, wait_for
from test_rl import rl_recipe

from jaxtune.data import open_tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.objectives.classification import Labels
from jaxtune.parallel import make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe.flags import Command
from jaxtune.tasks import evaluate, specs

USUAL = ('causal_lm', 'sft', 'dpo', 'classification')
EVERY = [pytest.param(name, marks=() if name in USUAL else pytest.mark.exhaustive) for name in OBJECTIVES]


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """Files of three sources of texts, and of conversations."""
    folder, rng, vocabulary = tmp_path_factory.mktemp('sources'), random.Random(1), SENTENCE.split()

    def write(name, count, record):
        path = folder / f'{name}.jsonl'
        path.write_text(''.join(json.dumps(record(i)) + '\n' for i in range(count)))

    def words(low, high):
        return ' '.join(rng.choice(vocabulary) for _ in range(rng.randint(low, high)))

    for split, times in (('train', 4), ('eval', 1)):
        for name, count in (('web', 20), ('books', 9), ('code', 5)):
            write(f'{name}.{split}', count * times, lambda i, name=name: {'text': f'{name} {i} {words(5, 60)}'})
        write(f'chat.{split}', 8 * times, lambda i: {'messages': [_turn('user', i), _turn('assistant', words(1, 6))]})
    return folder


def _turn(role, content):
    return {'role': role, 'content': f'{content}'}


def mixed(sources, split, **weights):
    return {name: {'path': f'{sources}/{name}.{split}.jsonl', 'weight': w} for name, w in weights.items()}


def thirds(sources, **changes):
    """A recipe over three sources, held out by label."""
    keys = recipe(sources, **changes)
    keys['data.train'] = mixed(sources, 'train', web=0.7, books=0.2, code=0.1)
    return keys | {'data.eval': {name: f'{sources}/{name}.eval.jsonl' for name in ('web', 'books', 'code')}}


def write_mixed_recipe(path, keys):
    """`write_recipe` writes texts: sources as mappings come last, from JSON."""
    plain = {key: value for key, value in keys.items() if not (key.startswith('data.') and isinstance(value, dict))}
    write_recipe(path, plain)
    lines = [f'    config.{key} = ConfigDict({value!r})' for key, value in keys.items() if key not in plain]
    path.write_text(path.read_text().replace('    return config\n', '\n'.join([*lines, '    return config', ''])))
    return path


STEPS = 40


@pytest.fixture(scope='module')
def whole(sources, tmp_path_factory):
    """The recipe of a mixture, and its run."""
    folder = tmp_path_factory.mktemp('whole')
    keys = thirds(sources, train__steps=STEPS, eval__every=10, checkpoint__every=7, mesh__fsdp=2)
    path = write_mixed_recipe(folder / 'recipe.py', keys)
    process = start(path, folder / 'whole', devices=4)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return path, folder / 'whole', output


def test_killed_it_ends_bit_for_bit_the_same(whole, tmp_path):
    path, reference, _ = whole
    for moment in (9, 23):
        process = start(path, tmp_path, devices=4)
        wait_for(lambda moment=moment: updates(tmp_path) >= moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(path, tmp_path, devices=4)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert exported(tmp_path) == exported(reference)
    for name in ('train/loss', 'eval/loss', 'eval/loss/web', 'eval/loss/books', 'eval/loss/code'):
        assert metrics(tmp_path, name) == metrics(reference, name)
    assert len(metrics(tmp_path, 'train/loss')) == STEPS


def test_two_hosts_train_on_the_same_rows(whole, tmp_path):
    path, reference, _ = whole
    codes, ended = finish(start_pod(path, tmp_path))
    assert codes == [0, 0], ended
    for name in ('train/loss', 'eval/loss', 'eval/loss/code'):
        np.testing.assert_allclose(metrics(tmp_path, name), metrics(reference, name), rtol=1e-5)


def test_held_out_loss_by_label_and_shares_are_said(whole):
    _, workdir, output = whole
    assert 'mixture    web 70 % (' in output
    line = next(line for line in output.splitlines() if line.startswith('mixture'))
    assert [part.split()[0] for part in line.removeprefix('mixture').split(', ')] == ['web', 'books', 'code']
    facts = json.loads((workdir / 'run.json').read_text())['mixture']
    taken = {label: one['rows'] for label, one in facts.items()}
    assert taken == {'web': 448, 'books': 128, 'code': 64}
    assert all(one['epochs'] > 1 for one in facts.values())
    for label in ('web', 'books', 'code'):
        assert len(metrics(workdir, f'eval/loss/{label}')) == 4
    page = (workdir / 'report.html').read_text()
    table = page[page.index('<h3>Sources') :].split('</table>')[0]
    result = json.loads((workdir / 'result.json').read_text())['metrics']
    for label, share in (('web', '70 %'), ('books', '20 %'), ('code', '10 %')):
        row = next(row for row in table.split('<tr>') if f'<td>{label}</td>' in row)
        assert share in row
        assert f'{facts[label]["epochs"]:.3g}' in row
        assert f'{result[f"eval/loss/{label}"]:.4f}' in row
    assert 'Held-out loss by source' in page


def run_evaluate(keys, workdir):
    """`task=evaluate` in this process."""
    config = full_config(keys | {'task': 'evaluate'})
    workdir.mkdir()
    return evaluate.run(config, workdir, Command('recipe.py', workdir, False, {'': config}, ('jaxtune',)))['metrics']


def test_the_whole_loss_is_the_mean_over_all_tokens_whatever_their_label(whole, sources, tmp_path):
    _, workdir, _ = whole
    keys = recipe(sources, model__path=str(workdir), tokenizer__path='') | {'model.config': {}}
    labels = ('web', 'books', 'code')
    together = run_evaluate(keys | {'data.eval': mixed(sources, 'eval', web=5, books=0.1, code=1)}, tmp_path / 'all')
    alone = {
        label: run_evaluate(keys | {'data.eval': f'{sources}/{label}.eval.jsonl'}, tmp_path / label) for label in labels
    }
    for label in labels:
        assert together[f'eval/loss/{label}'] == pytest.approx(alone[label]['eval/loss'], rel=1e-6)
        assert not any(name.startswith('eval/loss/') for name in alone[label])
    tokens = [alone[label]['eval/tokens'] for label in labels]
    assert together['eval/tokens'] == sum(tokens)
    mean = sum(alone[label]['eval/loss'] * n for label, n in zip(labels, tokens, strict=True)) / sum(tokens)
    assert together['eval/loss'] == pytest.approx(mean, rel=1e-6)
    assert together['eval/bits_per_byte'] > 0
    assert together == pytest.approx(
        {**together, 'eval/loss': json.loads((workdir / 'result.json').read_text())['metrics']['eval/loss']}, rel=1e-5
    )
    assert 'eval/loss/books' in (tmp_path / 'all' / 'metrics.jsonl').read_text()
    assert '<td>books</td>' in (tmp_path / 'all' / 'report.html').read_text()


def test_conversations_beside_texts(sources, tmp_path, capsys):
    keys = recipe(sources, 'sft', train__steps=12, eval__samples=2, generate__max_new_tokens=4)
    keys |= {'data.format': 'auto', 'data.eval': mixed(sources, 'eval', chat=1, web=1)}
    keys['data.train'] = mixed(sources, 'train', chat=3, web=1) | {
        'books': {'path': f'{sources}/books.train.jsonl', 'format': 'text'}
    }
    train(keys, tmp_path)
    said = capsys.readouterr().out
    assert 'mixture    chat 60 % (' in said
    assert metrics(tmp_path, 'eval/loss/chat')
    assert metrics(tmp_path, 'eval/loss/web')
    rows = specs.objective(full_config(keys)).dataset('train', tokenizers.load('bytes'), tmp_path / 'cache')
    text, chat = rows.parts['web'][0], rows.parts['chat'][0]
    scored = text['loss_mask'][:-1] > 0
    # All of a text but each document's first token; of a conversation the answers alone.
    assert scored.sum() >= (text['segment_ids'] > 0).sum() - text['segment_ids'].max() - 1
    assert 0 < chat['loss_mask'].sum() < 0.8 * (chat['segment_ids'] > 0).sum()
    samples = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    assert {sample['prompt'][0]['role'] for sample in samples} == {'user'}
    example = json.loads((tmp_path / 'run.json').read_text())['example']
    assert ['[web] ', False] in example


def test_texts_alone_are_no_conversations(sources, tmp_path):
    keys = recipe(sources, 'sft') | {'data.format': 'auto', 'data.train': f'{sources}/web.train.jsonl', 'data.eval': ''}
    with pytest.raises(UserError, match='expected the fields of'):
        train(keys, tmp_path / 'a')
    train(keys | {'data.format': 'text', 'train.steps': 2}, tmp_path / 'b')


def test_a_source_is_tokenised_once_whatever_its_weight(sources, tmp_path):
    keys = thirds(sources, train__steps=2)
    train(keys, tmp_path)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'cache').iterdir()}
    alone = keys | {'data.train': f'{sources}/web.train.jsonl', 'data.eval': f'{sources}/web.eval.jsonl'}
    again = specs.objective(full_config(alone))
    for split in ('train', 'eval'):
        again.dataset(split, tokenizers.load('bytes'), tmp_path / 'cache')
    keys['data.train'] = mixed(sources, 'train', web=1, code=9)
    specs.objective(full_config(keys)).dataset('train', tokenizers.load('bytes'), tmp_path / 'cache')
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'cache').iterdir()} == made


@pytest.mark.parametrize('objective', EVERY)
def test_every_objective_takes_sources_and_holds_out_of_them(corpus, tmp_path, capsys, objective):
    lines = (corpus / 'train.jsonl').read_text().splitlines()
    for name, some in (('a', lines[:40]), ('b', lines[30:])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(some) + '\n')
    keys = recipe(corpus, objective, train__steps=4, data__eval='auto', data__eval_fraction=0.2)
    keys['data.train'] = {'a': str(tmp_path / 'a.jsonl'), 'b': {'path': str(tmp_path / 'b.jsonl'), 'weight': 0.5}}
    train(keys, tmp_path / 'run')
    said = capsys.readouterr().out
    assert 'of 70 records of data.train are held out (a ' in said
    assert 'a 66.7 % (' in said
    for label in 'ab':
        assert len(metrics(tmp_path / 'run', f'eval/loss/{label}')) == 1
    assert 'mixture' in json.loads((tmp_path / 'run' / 'run.json').read_text())


@pytest.mark.parametrize('objective', EVERY)
def test_auto_holds_out_a_share_that_no_row_of_training_has(corpus, tmp_path, capsys, objective):
    keys = recipe(corpus, objective, train__steps=4, data__eval='auto', data__eval_fraction=0.2)
    train(keys, tmp_path / 'run')
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('data.eval=auto'))
    held, total = int(said.split()[1]), int(said.split()[3])
    assert total == 60
    assert 1 <= held < 60
    assert len(metrics(tmp_path / 'run', 'eval/loss')) == 1
    bound = specs.objective(full_config(keys))
    texts = {split: _texts_of(bound, split, tmp_path / 'cache') for split in ('train', 'eval')}
    assert not set(texts['train']) & set(texts['eval'])
    pairs = objective in ('reward', 'dpo')  # some of which are left out
    assert len(texts['train']) <= total - held if pairs else len(texts['train']) == total - held
    assert len(texts['eval']) <= held if pairs else len(texts['eval']) == held


def _texts_of(bound, split, cache):
    """What each record became, as bytes."""
    objective = bound.objective.name
    rows = bound.dataset(split, tokenizers.load('bytes'), cache)
    if objective in ('sft', 'reward', 'dpo'):
        examples = rows.examples
        ids = [examples[i].ids.tobytes() for i in range(len(examples))]
        return ids if objective == 'sft' else [b'|'.join(ids[i : i + 2]) for i in range(0, len(ids), 2)]
    if objective == 'classification':
        return [ids.tobytes() for ids, _, _ in rows.examples]
    data = bound.decided(cache)
    tokens = rows.source if objective == 'seq2seq' else None
    if tokens is None:  # from the cache, as the rows are
        tokens = open_tokens(data.of(split, *data.sources(split)), split, tokenizers.load('bytes'), cache)
    return [tokens.document(i).tobytes() for i in range(tokens.documents)]


def test_labels_are_those_of_all_sources(corpus, tmp_path):
    lines = [json.loads(line) for line in (corpus / 'train.jsonl').read_text().splitlines()]
    for label in ('early', 'late'):
        chosen = [json.dumps(line) for line in lines if line['label'] == label]
        (tmp_path / f'{label}.jsonl').write_text('\n'.join(chosen) + '\n')
    keys = recipe(corpus, 'classification', train__steps=2, data__eval='auto')
    keys['data.train'] = {label: str(tmp_path / f'{label}.jsonl') for label in ('early', 'late')}
    assert Labels.of(specs.data_spec(full_config(keys))).names == ('early', 'late')
    train(keys, tmp_path / 'run')
    assert len(metrics(tmp_path / 'run', 'eval/loss/late')) == 1


def test_evaluating_scores_what_training_held_out(corpus, tmp_path):
    keys = recipe(corpus, train__steps=4, data__eval='auto', data__eval_fraction=0.1)
    trained = train(keys, tmp_path / 'run')['metrics']
    keys |= {'model.path': str(tmp_path / 'run'), 'model.config': {}, 'tokenizer.path': ''}
    scored = run_evaluate(keys, tmp_path / 'scored')
    assert scored['eval/tokens'] == trained['eval/tokens']
    assert scored['eval/loss'] == pytest.approx(trained['eval/loss'], rel=1e-5)


def test_rewarded_prompts_of_several_sources(corpus, tmp_path, capsys):
    lines = (corpus / 'train.jsonl').read_text().splitlines()
    for name, some in (('a', lines[:40]), ('b', lines[40:])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(some) + '\n')
    keys = rl_recipe(corpus, 'grpo', train__steps=2)
    keys |= {'data.eval': 'auto', 'data.eval_fraction': 0.2}
    keys['data.train'] = {'a': {'path': str(tmp_path / 'a.jsonl'), 'weight': 3}, 'b': str(tmp_path / 'b.jsonl')}
    from jaxtune.tasks import rewarded

    config = full_config(keys)
    mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        bundle = load_model(specs.model_spec(config), mesh)
        prompts, held_out = rewarded.all_prompts(config, bundle)
    assert set(prompts) == {'a', 'b'}
    trained = {prompt.text for some in prompts.values() for prompt in some}
    assert held_out
    assert not trained & {prompt.text for prompt in held_out}
    order = rewarded.prompt_order(config, prompts)
    assert [str(share) for share in order.shares.values()] == ['3/4', '1/4']
    numbers = {label: {int(part[i]['number']) for i in range(len(part))} for label, part in order.parts.items()}
    assert numbers['a'] | numbers['b'] == set(range(sum(map(len, prompts.values()))))
    workdir = tmp_path / 'run'
    workdir.mkdir()
    rewarded.run_on(mesh, config, workdir, Command('recipe.py', workdir, False, {'': config}, ('jaxtune',)))
    said = capsys.readouterr().out
    assert 'mixture    a 75 % (' in said
    assert 'records of data.train are held out (a ' in said
    assert metrics(workdir, 'eval/reward')


def test_check_reads_every_source(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('test_check.write_recipe', write_mixed_recipe)
    assert check(tmp_path, thirds(sources)) == 0
    assert 'rows of data.train (books, code, web)' in capsys.readouterr().out.splitlines()[-1]


WRONG = {
    'a missing file': ({'data.train': {'a': 'nowhere.jsonl', 'b': 'b.jsonl'}}, 'data.train=nowhere.jsonl'),
    'too small a part': ({'data.train': 'SOURCES/web.train.jsonl:1,SOURCES/code.train.jsonl:1e-9'}, '1,048,576th'),
    'auto without data': ({'data.train': '', 'data.eval': 'auto', 'task': 'evaluate'}, 'data.eval=auto'),
    'auto of no share': ({'data.eval': 'auto', 'data.eval_fraction': 0.0}, 'data.eval_fraction=0'),
    'auto to generate from': ({'data.eval': 'auto', 'task': 'generate'}, 'data.eval=auto: is for training'),
    'sources to prepare': ({'task': 'prepare'}, 'task=prepare mixes data.sources'),
    'a format': ({'data.train': {'a': {'path': 'SOURCES/web.train.jsonl', 'format': 'chats'}}}, "format of 'a'"),
    'nothing to hold out': ({'data.train': 'SOURCES/one.jsonl', 'data.eval': 'auto'}, 'data.train has 1 records'),
}


@pytest.mark.parametrize('name', WRONG)
def test_what_is_wrong_is_said_before_anything_is_loaded(sources, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr('test_check.write_recipe', write_mixed_recipe)
    (sources / 'one.jsonl').write_text('{"text": "alone"}\n')
    changes, expected = WRONG[name]
    place = lambda value: value.replace('SOURCES', str(sources)) if isinstance(value, str) else value  # noqa: E731
    changes = {key: json.loads(place(json.dumps(value))) for key, value in changes.items()}
    assert check(tmp_path, thirds(sources) | changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
