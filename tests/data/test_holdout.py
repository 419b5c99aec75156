"""`data.eval=auto`: what is held out is a function of what records say, and of nothing else."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxtune.common.sources import DataSource
from jaxtune.data import holdout, open_tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.documents import TEXTS
from jaxtune.data.holdout import Holdout, decide
from jaxtune.data.spec import DataSpec
from jaxtune.errors import UserError

BYTES = tokenizers.load('bytes')


def write(path, texts):
    path.write_text(''.join(json.dumps({'text': text, 'id': i}) + '\n' for i, text in enumerate(texts)))
    return str(path)


def spec(train, fraction=0.1, seed=0):
    return DataSpec(train, train, holdout=Holdout(fraction, seed))


def texts(data, split, cache):
    tokens = open_tokens(data, split, BYTES, cache)
    return [bytes(tokens.document(i)[:-1].tolist()).decode() for i in range(tokens.documents)]


def split_of(path, cache, **changes):
    """The texts of both sides."""
    data = spec(path, **changes)
    found, counts = decide(data, TEXTS, cache)
    source = data.sources('train')[0]
    data = DataSpec(path, path, holdout=found).of('train', source)
    both = [texts(data, split, cache) for split in ('train', 'eval')]
    assert counts == {'': (len(both[1]), len(both[0]) + len(both[1]))}
    return both


def test_each_record_is_on_one_side_and_the_same_text_on_the_same(tmp_path):
    some = [f'text number {i}' for i in range(400)]
    train, held_out = split_of(write(tmp_path / 'a.jsonl', [*some, *some[:100], *(f'{t} ' for t in some)]), tmp_path)
    assert sorted({text.strip() for text in train} | {text.strip() for text in held_out}) == sorted(some)
    assert not {text.strip() for text in train} & {text.strip() for text in held_out}
    assert 0.05 < len(held_out) / 900 < 0.15


def test_other_records_move_none_and_another_seed_moves_some(tmp_path):
    some = [f'text number {i}' for i in range(400)]
    _, before = split_of(write(tmp_path / 'a.jsonl', some), tmp_path)
    _, after = split_of(write(tmp_path / 'b.jsonl', [f'new {i}' for i in range(300)] + some[::-1]), tmp_path)
    assert set(before) == {text for text in after if not text.startswith('new')}
    _, other = split_of(str(tmp_path / 'a.jsonl'), tmp_path, seed=1)
    assert set(other) != set(before)


def test_changed_data_are_read_anew(tmp_path):
    path = write(tmp_path / 'a.jsonl', ['one', 'two', 'three'])
    first = split_of(path, tmp_path)
    assert split_of(path, tmp_path) == first
    write(tmp_path / 'a.jsonl', ['four', 'five', 'six', 'seven'])
    train, held_out = split_of(path, tmp_path)
    assert sorted(train + held_out) == ['five', 'four', 'seven', 'six']


scores = st.lists(st.integers(0, 40).map(lambda n: n / 41), min_size=1, max_size=12)


@given(st.dictionaries(st.sampled_from('abc'), scores, min_size=1), st.floats(0.001, 0.5))
def test_no_side_of_any_source_is_empty_or_it_is_refused(sources, fraction):
    arrays = {label: np.array(values) for label, values in sources.items()}
    if any(len(set(values)) < 2 for values in sources.values()):
        with pytest.raises(UserError, match=r'data\.eval=auto'):
            Holdout(fraction, 0).decided(arrays)
        return
    try:
        found = Holdout(fraction, 0).decided(arrays)
    except UserError:
        assume(len(sources) == 1)  # exceptions of one may be all that another has
        raise
    for values in sources.values():
        assert 0 < found.count(values) < len(values)
    exceptions = set(found.added) | set(found.spared)
    assert all(found.holds(v) == (v < fraction) for values in sources.values() for v in values if v not in exceptions)


def test_a_text_of_two_sources_is_on_one_side_of_both(tmp_path):
    """Also where it is held out only because its source has nothing else to hold out."""
    a = [f'only in a {i}' for i in range(3)]
    alone = (DataSource('a', write(tmp_path / 'a.jsonl', a)),)
    found, counts = decide(spec(alone, fraction=1e-6), TEXTS, tmp_path)
    assert counts == {'a': (1, 3)}
    (forced,) = [text for text in a if found.holds(found.score(text))]
    b = [*a, *(f'in b {i}' for i in range(30))]
    both = (*alone, DataSource('b', write(tmp_path / 'b.jsonl', b)))
    data = spec(both, fraction=1e-6)
    found, _ = decide(data, TEXTS, tmp_path)
    data = DataSpec(both, both, holdout=found)
    trained = [text for source in both for text in texts(data.of('train', source), 'train', tmp_path)]
    held_out = [text for source in both for text in texts(data.of('eval', source), 'eval', tmp_path)]
    assert forced in held_out
    assert not set(trained) & set(held_out)


@pytest.mark.parametrize('some', [['one'], ['same', 'same', 'same'], []])
def test_too_little_is_refused(tmp_path, some):
    with pytest.raises(UserError, match=rf'data.train has {len(some)} records, .*one at least to hold out'):
        decide(spec(write(tmp_path / 'a.jsonl', some)), TEXTS, tmp_path)


def test_what_a_prepare_stage_held_out_is_taken(tmp_path):
    (tmp_path / 'prepared' / 'train').mkdir(parents=True)
    (tmp_path / 'prepared' / 'train' / 'meta.json').write_text('{}')
    data = spec(str(tmp_path / 'prepared'))
    found, counts = decide(data, TEXTS, tmp_path)
    assert counts == {}
    assert holdout.words(counts) == 'data.eval=auto: what the prepare stage held out'
    assert holdout.key_of(data, 'eval') == 'data.eval'
    with pytest.raises(UserError, match='the prepared folder has no eval/'):
        open_tokens(DataSpec(data.train, data.eval, holdout=found), 'eval', BYTES, tmp_path)


@pytest.mark.parametrize('content', ['{', '[]', '{"added": 3}', '{"added": [], "spared": [], "counts": [1]}'])
def test_a_damaged_cache_is_said(tmp_path, content):
    data = spec(write(tmp_path / 'a.jsonl', ['one', 'two', 'three']))
    decide(data, TEXTS, tmp_path)
    (file,) = tmp_path.glob('holdout-*.json')
    file.write_text(content)
    with pytest.raises(UserError, match=file.name):
        decide(data, TEXTS, tmp_path)
