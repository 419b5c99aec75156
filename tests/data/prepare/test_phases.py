"""The long way from files to a training set: what comes out, and that it always is the same."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxtune.data import open_tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.prepare import phases, steps
from jaxtune.data.spec import DataSpec
from jaxtune.data.tokens import Tokens
from jaxtune.errors import UserError

from .conftest import contents
from .corpus import altered, prose, words

PAGE = '<html><head><title>t</title></head><body><nav><a href="/">Home</a></nav><article>{}</article></body></html>'
STEPS = {
    'data.steps.clean.encoding': True,
    'data.steps.clean.unicode': True,
    'data.steps.clean.markup': True,
    'data.steps.clean.pii': True,
    'data.steps.filter.preset': 'auto',
    'data.steps.dedup.near': 0.8,
    'data.steps.dedup.paragraphs': 3,
    'data.steps.dedup.substring': 40,
}
STAMP = 'All rights of this made up page are reserved by somebody'
QUOTED = ' '.join(words(45, 'quoted'))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Three kinds of sources, in many tasks, with duplicates between and inside them."""
    monkeypatch.setattr('jaxtune.data.prepare.sources._TASK', 30_000)
    monkeypatch.setattr('jaxtune.data.prepare.sources._CUT', 20_000)
    root = tmp_path / 'corpus'
    (root / 'web').mkdir(parents=True)
    (root / 'code').mkdir()
    texts = [prose(300, i) for i in range(60)]
    texts[50] += f'\n\nHe said: {QUOTED}.'
    texts[51] = f'{QUOTED.upper()}!\n\n{texts[51]}'
    for i, text in enumerate(texts[:20]):
        body = ''.join(f'<p>{part}</p>' for part in text.split('\n\n')) + f'<p>{STAMP}</p>'
        (root / 'web' / f'{i:02d}.html').write_text(PAGE.format(body))
    rows = [
        *texts[20:],
        texts[25],
        altered(texts[30], 0.9, 1),
        'short',
        'Write to me at someone@somewhere.org. ' + texts[40],
    ]
    (root / 'books.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in rows))
    (root / 'code' / 'a.py').write_text('def first(x):\n    """Returns x."""\n    return x\n' * 5)
    (root / 'code' / 'min.js').write_text('var a=1;' * 1000)
    (root / 'code' / 'LICENSE').write_text('Permission is hereby granted, free of charge, to any person')
    return root


def recipe_of(corpus, **changes):
    sources = {
        'web': {'path': str(corpus / 'web'), 'kind': 'web', 'weight': 2.0},
        'books': {'path': str(corpus / 'books.jsonl'), 'kind': 'books'},
        'code': {'path': str(corpus / 'code'), 'kind': 'code'},
    }
    return {'data.sources': sources, **STEPS, 'data.eval_fraction': 0.1, 'data.min_chars': 20, **changes}


def test_what_is_made(corpus, prepared, recipe, tmp_path):
    result = prepared('a', recipe_of(corpus))
    stats = json.loads((tmp_path / 'a' / 'stats.json').read_text())
    counts = stats['steps']
    assert list(counts) == [name for name in phases_order() if name in counts]
    assert counts['extract']['documents_in'] == counts['extract']['documents_out'] == 20
    assert counts['length']['dropped']['under 20 characters']['examples'][0]['text'] == 'short'
    assert [entry['documents'] for entry in counts['exact duplicates']['dropped'].values()] == [1]
    assert sum(entry['documents'] for entry in counts['near-duplicates']['dropped'].values()) == 2
    assert counts['code']['dropped'].keys() == {'minified: a line of over 1000 characters'}
    assert counts['paragraphs']['changed'] == 19
    assert counts['substrings']['changed'] == 1
    assert counts['exact duplicates']['documents_out'] == counts['near-duplicates']['documents_in'] == 63

    tokenizer = tokenizers.load(str(tmp_path / 'a' / 'tokenizer'))
    sides = {}
    for side in ('train', 'eval'):
        tokens = open_tokens(
            DataSpec(f'{tmp_path}/a', f'{tmp_path}/a'), side, tokenizer, tmp_path / 'cache'
        )  # as training does
        ids = [tokens.document(i) for i in range(tokens.documents)]
        assert all(document[-1] == tokenizer.eos_token_id for document in ids)
        sides[side] = [tokenizer.decode(document[:-1]) for document in ids]
        assert tokens.text_bytes == sum(len(text.encode()) for text in sides[side])
        assert result['metrics'][f'data/{side}_tokens'] == len(tokens)
    assert not set(sides['train']) & set(sides['eval'])
    assert len(set(sides['train'])) + len(sides['eval']) == result['metrics']['data/documents'] == 61
    # Of weight 2, the pages to train on are there twice; what all pages say is in the first of them only.
    twice = [text for text in set(sides['train']) if sides['train'].count(text) == 2]
    assert len(twice) == len(sides['train']) - len(set(sides['train'])) == stats['sources']['web']['copies'] - 20 > 10
    whole = sides['train'] + sides['eval']
    assert len({text for text in whole if STAMP in text}) == 1
    assert [text.count(QUOTED) for text in whole if QUOTED.lower() in text.lower()] == [1]
    assert not any('someone@somewhere.org' in text for text in whole)
    held_out = [json.loads(line)['text'] for line in (tmp_path / 'a' / 'eval.jsonl').read_text().splitlines()]
    assert held_out == sides['eval']
    manifest = json.loads((tmp_path / 'a' / 'manifest.json').read_text())
    files = contents(tmp_path / 'a')
    assert all(files[name] == entry['sha256'] for name, entry in manifest['files'].items())
    assert {'train/tokens.bin', 'eval/offsets.npy', 'tokenizer/tokenizer.json', 'stats.json'} <= manifest[
        'files'
    ].keys()
    assert not (tmp_path / 'a' / 'work').exists()


def phases_order():
    return steps.STEPS.names


def test_the_same_bytes_with_two_workers_and_after_an_interruption(corpus, prepared, tmp_path, monkeypatch):
    prepared('one', recipe_of(corpus))
    prepared('two', recipe_of(corpus, **{'data.workers': 2}))
    tokenise = phases.tokenise

    def killed(work, rank):
        if rank == 2:
            raise KeyboardInterrupt
        tokenise(work, rank)

    monkeypatch.setattr(phases, 'tokenise', killed)
    with pytest.raises(KeyboardInterrupt):
        prepared('cut', recipe_of(corpus))
    assert not (tmp_path / 'cut' / 'result.json').exists()
    monkeypatch.setattr(phases, 'tokenise', tokenise)
    monkeypatch.setattr(phases, 'collect', None)  # what was done is not done again
    prepared('cut', recipe_of(corpus))
    whole = contents(tmp_path / 'one')
    assert len(whole) >= 12
    assert contents(tmp_path / 'two') == whole
    assert contents(tmp_path / 'cut') == whole


def test_killed(corpus, prepared, tmp_path):
    prepared('whole', recipe_of(corpus))
    (tmp_path / 'recipe.py').write_text(
        'from ml_collections import ConfigDict\n'
        'from jaxtune.recipe import recipes\n'
        'from jaxtune.data.prepare import sources\n'
        'sources._TASK, sources._CUT = 30_000, 20_000\n'
        'def get_config():\n'
        f'    changes = {recipe_of(corpus)!r}\n'
        "    config = ConfigDict({'task': 'prepare', 'data': {'vocab_size': 400, 'workers': 2}})\n"
        '    for name, value in changes.items():\n'
        "        *parents, last = name.split('.')\n"
        '        node = config\n'
        '        for parent in parents:\n'
        '            node = recipes.child(node, parent)\n'
        '        node[last] = ConfigDict(value) if isinstance(value, dict) else value\n'
        '    return config\n'
    )
    command = [sys.executable, '-m', 'jaxtune.main', '--config', str(tmp_path / 'recipe.py')]
    command += ['--workdir', str(tmp_path / 'cut')]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    root = pathlib.Path(__file__).resolve().parents[3]
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.DEVNULL)
    begun = time.monotonic()
    done = tmp_path / 'cut' / 'work' / 'documents'
    while not list(done.glob('0*')) and process.poll() is None and time.monotonic() - begun < 120:
        time.sleep(0.02)
    later = np.random.default_rng().uniform(0, 1.5)
    print(f'killed {later:.2f} s after the first documents')
    time.sleep(later)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, env=environment, cwd=root, capture_output=True)
    assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


def test_shards_of_tokens_are_cut_between_documents(corpus, prepared, tmp_path):
    prepared('one', recipe_of(corpus))
    prepared('many', recipe_of(corpus, **{'data.steps.build.shard_tokens': 5000}))
    one, many = Tokens.open(tmp_path / 'one' / 'train'), Tokens.open(tmp_path / 'many' / 'train')
    assert len(many.tokens.parts) > 3
    assert max(map(len, many.tokens.parts)) <= 5000
    assert set(many.tokens.ends) <= set(many.offsets)
    np.testing.assert_array_equal(many.tokens[: len(many)], one.tokens)
    for start in range(0, len(one) - 700, 997):
        np.testing.assert_array_equal(many.tokens[start : start + 700], one.tokens[start : start + 700])


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'data.sources': {'a': {'path': 'x', 'wieght': 2}}}, r'data\.sources\.a\.wieght: unknown key.*a\.weight'),
        ({'data.sources': {'a': {'path': 'x', 'kind': 'wob'}}}, r"data\.sources\.a\.kind='wob': expected one of .*web"),
        ({'data.sources': {'a': {'kind': 'web'}}}, r"data\.sources\.a\.path='': expected"),
        ({'data.sources': {'a': {'path': 'x', 'weight': 0}}}, r'data\.sources\.a\.weight=0: expected a number > 0'),
        ({'data.sources': {'a': {'path': 'nowhere.jsonl', 'kind': 'web'}}}, r'nowhere\.jsonl: no such file'),
        ({'data.sources': {}, 'data.steps.dedup.near': 0.8}, r"data\.train='': expected"),
        ({'data.train': 'x.txt', 'data.steps.dedup.substring': 3}, r'dedup\.substring=3: expected 0 \(off\)'),
        ({'data.train': 'x.txt', 'data.engine': 'slurm'}, 'no such file'),
    ],
)
def test_what_is_refused(changes, words, prepared):
    with pytest.raises(UserError, match=words):
        prepared('a', changes)


def test_step_names_are_checked(recipe):
    with pytest.raises(UserError, match=r'data\.steps\.dedup\.neer: unknown key; the nearest valid key is data\.steps'):
        recipe({'data.steps.dedup.neer': 0.8})


def test_a_missing_package_is_named(corpus, prepared, monkeypatch):
    monkeypatch.setattr('jaxtune.data.prepare.plan._installed', lambda name: name != 'datatrove')
    with pytest.raises(UserError, match=r"need datatrove, which is not installed: pip install 'jaxtune\[data\]'"):
        prepared('a', recipe_of(corpus))
