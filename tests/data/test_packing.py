import collections
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.packing import concat_rows, pack, window_rows

from .conftest import tokens_of

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
SEQ_LEN = st.integers(2, 17)


def parts(row):
    """The segments of a row, as lists of ids; checks what holds for every row."""
    segment_ids, n = row['segment_ids'], int(np.count_nonzero(row['segment_ids']))
    assert {name: value.dtype for name, value in row.items()} == {
        'tokens': np.int32, 'targets': np.int32, 'positions': np.int32, 'segment_ids': np.int32,
        'loss_mask': np.float32,
    }  # fmt: skip
    assert not any(value[n:].any() for value in row.values()), 'padding is zeros at the end'
    assert not (row['targets'] * (1 - row['loss_mask'])).any()
    found = []
    for number in range(1, segment_ids.max() + 1):
        where = np.flatnonzero(segment_ids == number)
        assert where.tolist() == list(range(where[0], where[-1] + 1)), 'a segment is one run'
        assert row['positions'][where].tolist() == list(range(len(where)))
        found.append(row['tokens'][where].tolist())
        inner = where[:-1]
        assert (row['loss_mask'][inner] == 1).all()
        assert (row['targets'][inner] == row['tokens'][inner + 1]).all()
    return found


@given(LENGTHS, SEQ_LEN)
def test_concat_rows(lengths, seq_len):
    tokens = tokens_of(lengths)
    rows = concat_rows(tokens, seq_len)
    assert len(rows) == -(-len(tokens) // seq_len)
    stream, targets = [], []
    for i in range(len(rows)):
        row = rows[i]
        stream += [token for part in parts(row) for token in part]
        scored = row['loss_mask'] == 1
        assert (row['targets'][scored] == row['tokens'][scored] + 1).all()  # ids count through the stream
        targets += row['targets'][scored].tolist()
        if i + 1 < len(rows):
            assert (row['segment_ids'] > 0).all()
    firsts = {int(at) + 1 for at, size in zip(tokens.offsets, lengths, strict=False) if size}
    assert stream == tokens.tokens.tolist()
    assert targets == [token for token in tokens.tokens.tolist() if token not in firsts]
    assert rows.unscored_tokens == len(firsts)
    assert sum(row['loss_mask'].sum() for row in map(rows.__getitem__, range(len(rows)))) == len(tokens) - len(firsts)


@given(LENGTHS, SEQ_LEN)
def test_window_rows_packed_and_not_hold_the_same_windows(lengths, seq_len):
    tokens = tokens_of(lengths)
    expected = [
        tokens.tokens[low : min(low + seq_len, end)].tolist()
        for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False)
        for low in range(start, end, seq_len)
    ]
    for packing in (True, False):
        rows = window_rows(tokens, seq_len, packing)
        found, weights = [], 0
        for row in map(rows.__getitem__, range(len(rows))):
            segment_ids = parts(row)
            assert segment_ids
            assert packing or len(segment_ids) == 1
            found += segment_ids
            weights += row['loss_mask'].sum()
        assert collections.Counter(map(tuple, found)) == collections.Counter(map(tuple, expected))
        assert packing or found == expected
        assert rows.unscored_tokens == len(expected)
        assert weights == len(tokens) - len(expected)
        assert rows.tokens is tokens


@given(LENGTHS, SEQ_LEN)
def test_packed_rows_follow_the_documents(lengths, seq_len):
    rows = window_rows(tokens_of(lengths), seq_len, True)
    firsts = [rows[i]['tokens'][0] for i in range(len(rows))]
    assert firsts == sorted(firsts)


def best_fit_one_by_one(sizes, capacity):
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_pack_is_best_fit_decreasing(sizes):
    bins = pack(np.array(sizes), 12)
    assert sorted(set(bins.tolist())) == list(range(bins.max() + 1))
    loads = np.bincount(bins, weights=sizes)
    assert sorted((12 - loads).tolist()) == best_fit_one_by_one(sizes, 12)


def test_a_million_windows_are_packed_at_once():
    sizes = np.minimum(np.random.default_rng(0).geometric(1 / 300, 1_000_000), 1024)
    start = time.perf_counter()
    bins = pack(sizes, 1024)
    assert time.perf_counter() - start < 20
    loads = np.bincount(bins, weights=sizes)
    assert loads.max() <= 1024
    assert loads.sum() == sizes.sum()
    assert len(loads) < 1.01 * sizes.sum() / 1024


def test_rows_have_ends():
    rows = concat_rows(tokens_of([5]), 4)
    with pytest.raises(IndexError):
        rows[2]
    with pytest.raises(IndexError):
        rows[-1]
