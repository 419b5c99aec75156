import gc
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.loader import Loader, Prefetch
from jaxtune.data.packing import concat_rows, window_rows
from jaxtune.errors import UserError
from jaxtune.parallel import place

from .conftest import tokens_of

ROWS = concat_rows(tokens_of([9, 4, 30, 1, 20]), 5)  # 13 rows; the first token tells which


def numbers(batch):
    return ((batch['tokens'][:, 0] - 1) // 5).tolist()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@settings(max_examples=40)
@given(st.integers(0, 2**40), st.integers(1, 20), st.integers(0, 1000), st.data())
def test_a_batch_is_a_function_of_seed_and_number(seed, batch_size, t, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, batch_size), max_size=4)) | {0, batch_size})
    whole = Loader(ROWS, batch_size, seed).rows(t, 0, batch_size)
    again = Loader(ROWS, batch_size, seed)
    again.rows(t + 3, 0, 1)
    pieces = [again.rows(t, low, high) for low, high in itertools.pairwise(cuts)]
    assert same(whole, {name: np.concatenate([piece[name] for piece in pieces]) for name in whole})
    assert whole['tokens'].shape == (batch_size, 5)


def test_each_pass_is_a_permutation_of_its_own():
    loader = Loader(ROWS, 4, seed=3)
    stream = [number for t in range(13) for number in numbers(loader.rows(t, 0, 4))]
    passes = [tuple(stream[i : i + 13]) for i in range(0, 52, 13)]
    assert all(sorted(order) == list(range(13)) for order in passes)
    assert len(set(passes)) == 4
    other = Loader(ROWS, 4, seed=4)
    assert passes[1] != tuple(number for t in range(4) for number in numbers(other.rows(t, 0, 4)))[:13]


def test_in_order_the_last_batch_is_filled_with_nothing():
    loader = Loader(ROWS, 5, shuffle=False)
    assert len(loader) == 3
    seen = [loader.rows(t, 0, 5) for t in range(3)]
    assert [number for batch in seen for number in numbers(batch)][:13] == list(range(13))
    assert not any(value[3:].any() for value in seen[2].values())
    assert same(loader.rows(3, 0, 5), seen[0])
    total = sum(batch['loss_mask'].sum() for batch in seen)
    assert total == len(ROWS.tokens) - ROWS.unscored_tokens


def test_rows_that_are_packed_work_too():
    loader = Loader(window_rows(tokens_of([3, 9, 2]), 8), 2, shuffle=False)
    assert loader.rows(0, 0, 2)['loss_mask'].sum() == 14 - 4


def test_no_rows():
    with pytest.raises(UserError, match='no rows'):
        Loader(concat_rows(tokens_of([0]), 4), 2)


def test_prefetch_equals_rows():
    loader = Loader(ROWS, 4, seed=1)
    with loader.prefetch(7, 30, lambda rows: rows(1, 3)) as batches:
        found = list(batches)
    assert len(found) == 23
    assert all(same(batch, loader.rows(t, 1, 3)) for t, batch in enumerate(found, 7))


def test_prefetch_places_batches_on_the_mesh():
    mesh = jax.make_mesh((4, 2, 1), ('data', 'fsdp', 'sequence'))
    loader = Loader(ROWS, 8, seed=1)
    with jax.set_mesh(mesh), loader.prefetch(2, 6, lambda rows: place(rows, 8, mesh)) as batches:
        for t, batch in enumerate(batches, 2):
            assert same({name: np.asarray(value) for name, value in batch.items()}, loader.rows(t, 0, 8))
            assert len(batch['tokens'].addressable_shards) == 8


def alive():
    return [thread for thread in threading.enumerate() if thread.name == 'jaxtune-prefetch']


def test_prefetch_reads_ahead_but_not_without_end():
    calls = []
    with Prefetch(lambda t: calls.append(t) or t, 0, 100, depth=3) as batches:
        deadline = time.monotonic() + 5
        while len(calls) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert calls == [0, 1, 2, 3]  # three are ready, one waits for its place
        assert next(batches) == 0
    assert not alive()


def test_prefetch_raises_in_the_consumer():
    def read(t):
        if t == 2:
            raise UserError('row 2 is broken')
        return t

    batches = Prefetch(read, 0, 10)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(UserError, match='row 2 is broken'):
        next(batches)
    assert list(batches) == []
    assert not alive()


@settings(max_examples=5)
@given(st.integers(0, 3))
def test_a_forgotten_prefetch_ends_its_thread(taken):
    batches = Prefetch(lambda t: t, 0, 1000)
    for _ in range(taken):
        next(batches)
    del batches
    gc.collect()
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()
