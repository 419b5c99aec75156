import json

import pytest

from jaxtune.data import open_tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.documents import open_documents
from jaxtune.data.prepare import streaming
from jaxtune.data.spec import DataSpec
from jaxtune.errors import UserError
from jaxtune.recipe import workdir as workdirs
from jaxtune.recipe.flags import Command
from jaxtune.tasks import prepare

TIMED = ('run.json', 'report.html')  # they say when, and how long it took
TEXTS = [f'document {i}: ' + 'some words and more ' * (i % 5 + 1) for i in range(60)]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / 'corpus.jsonl'
    texts = [*TEXTS, TEXTS[3], 'short', TEXTS[7]]
    file.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return file


@pytest.fixture
def prepared(recipe, tmp_path):
    def make(name, **changes):
        config = recipe({'task': 'prepare', 'data.vocab_size': 400, **changes})
        (tmp_path / name).mkdir(exist_ok=True)
        workdirs.open_workdir(tmp_path / name, config, False)
        command = Command('recipe.py', tmp_path / name, False, {'': config}, ('jaxtune',))
        return prepare.run(config, tmp_path / name, command)

    return make


def test_what_is_made(corpus, prepared, recipe, tmp_path, capsys):
    result = prepared('a', **{'data.train': str(corpus), 'data.min_chars': 10, 'data.eval_fraction': 0.2})
    metrics = result['metrics']
    assert result == json.loads((tmp_path / 'a' / 'result.json').read_text())
    assert (result['task'], result['status'], result['step']) == ('prepare', 'done', 0)
    assert (metrics['data/documents'], metrics['data/dropped_short'], metrics['data/dropped_duplicates']) == (60, 1, 2)
    tokenizer = tokenizers.load(str(tmp_path / 'a' / 'tokenizer'))
    sides = {}
    for split in ('train', 'eval'):
        tokens = open_tokens(DataSpec(f'{tmp_path}/a', f'{tmp_path}/a'), split, tokenizer, tmp_path / 'cache')
        documents = [tokens.document(i).tolist() for i in range(tokens.documents)]
        assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
        sides[split] = [tokenizer.decode(ids[:-1]) for ids in documents]
        assert metrics[f'data/{split}_tokens'] == len(tokens)
        assert metrics[f'data/{split}_documents'] == tokens.documents
    assert sorted(sides['train'] + sides['eval']) == sorted(TEXTS)
    assert not set(sides['train']) & set(sides['eval'])
    assert 3 < len(sides['eval']) < 25
    assert list(open_documents(str(tmp_path / 'a' / 'eval.jsonl'))) == sides['eval']
    assert metrics['data/eval_gzip_bits_per_byte'] == tokens.gzip_bits_per_byte
    train_bytes = sum(len(text) for text in sides['train'])
    assert metrics['data/bytes_per_token'] == train_bytes / metrics['data/train_tokens']
    said = capsys.readouterr().out
    assert said.startswith(f'reading data.train={corpus}; writing to ')
    assert 'gzip -9' in said
    flags = [f'--config.pretrain.{key}={tmp_path / "a"}' for key in ('data.train', 'data.eval', 'tokenizer.path')]
    assert said.rstrip().endswith(f'--config.stages=pretrain {" ".join(flags)}')


def test_two_runs_are_the_same_byte_for_byte(corpus, prepared, tmp_path):
    for name in ('a', 'b'):
        prepared(name, **{'data.train': str(corpus)})
    files = [path.relative_to(tmp_path / 'a') for path in (tmp_path / 'a').rglob('*') if path.is_file()]
    files = [path for path in files if path.name not in TIMED]
    assert {'tokens.bin', 'tokenizer.json', 'eval.jsonl', 'result.json'} <= {file.name for file in files}
    for file in files:
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes(), file


def test_an_interrupted_run_ends_the_same(corpus, prepared, tmp_path, monkeypatch):
    prepared('whole', **{'data.train': str(corpus)})
    finish = streaming.TokenWriter._finish

    def killed(self):
        if self.folder.name == 'train':
            raise KeyboardInterrupt
        finish(self)

    monkeypatch.setattr(streaming.TokenWriter, '_finish', killed)
    with pytest.raises(KeyboardInterrupt):
        prepared('cut', **{'data.train': str(corpus)})
    assert not (tmp_path / 'cut' / 'result.json').exists()
    monkeypatch.undo()
    prepared('cut', **{'data.train': str(corpus)})
    for path in (tmp_path / 'whole').rglob('*'):
        if path.is_file() and path.name not in TIMED:
            other = tmp_path / 'cut' / path.relative_to(tmp_path / 'whole')
            assert path.read_bytes() == other.read_bytes()
    assert {path.name for path in (tmp_path / 'cut').iterdir()} == {
        path.name for path in (tmp_path / 'whole').iterdir()
    }


def test_a_document_stays_on_its_side_when_others_come(corpus, tmp_path):
    plan = streaming.Splits(open_documents(str(corpus)), 1, 0.3)
    more = tmp_path / 'more.jsonl'
    more.write_text(''.join(json.dumps({'text': text}) + '\n' for text in ['new', *reversed(TEXTS), 'newer']))
    grown = streaming.Splits(open_documents(str(more)), 1, 0.3)
    assert set(plan.texts(streaming.EVAL)) - {'short'} == set(grown.texts(streaming.EVAL)) - {'new', 'newer'}


@pytest.mark.parametrize('fraction', [1e-12, 0.5])
def test_both_sides_get_a_document(fraction, tmp_path):
    for i in range(20):
        file = tmp_path / f'{i}.jsonl'
        file.write_text(''.join(json.dumps({'text': f'{i} {j}'}) + '\n' for j in range(2)))
        plan = streaming.Splits(open_documents(str(file)), 1, fraction)
        assert (plan.count(streaming.TRAIN), plan.count(streaming.EVAL)) == (1, 1)


def test_none_held_out(corpus, prepared, tmp_path):
    metrics = prepared('a', **{'data.train': str(corpus), 'data.eval_fraction': 0.0})['metrics']
    assert (metrics['data/eval_tokens'], metrics['data/train_documents']) == (0, 61)
    assert not (tmp_path / 'a' / 'eval').exists()


def test_a_tokenizer_that_is_named_is_used_and_copied(corpus, prepared, tmp_path):
    metrics = prepared('a', **{'data.train': str(corpus), 'tokenizer.path': 'bytes'})['metrics']
    assert metrics['data/vocab_size'] == 259
    copy = tokenizers.load(str(tmp_path / 'a' / 'tokenizer'))
    assert tokenizers.fingerprint(copy) == tokenizers.fingerprint(tokenizers.load('bytes'))


def test_sources_one_after_the_other(recipe, tmp_path):
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text(f'text {name}')
    sources = {'data.sources': {name: str(tmp_path / f'{name}.txt') for name in 'ba'}}
    documents = streaming.collect(recipe(sources).data)
    assert sorted(documents) == ['text a', 'text b']
    assert list(documents) == list(documents)


def test_what_is_refused(prepared, tmp_path):
    (tmp_path / 'one.txt').write_text('only one document')
    for changes, words in (
        ({'data.train': str(tmp_path / 'one.txt')}, r'one\.txt: 1 documents.*expected at least 2'),
        ({'data.train': ''}, r"data\.train='': expected"),
        ({'data.train': str(tmp_path / 'no.txt')}, 'no such file'),
        ({'data.sources': {'x': 7}}, r'data\.sources\.x=7: expected a path'),
    ):
        with pytest.raises(UserError, match=words):
            prepared('refused', **changes)


def test_documents_that_change_meanwhile(corpus):
    plan = streaming.Splits(open_documents(str(corpus)), 1, 0.3)
    corpus.write_text('{"text": "another"}\n')
    with pytest.raises(UserError, match='changed while it was read'):
        list(plan)
