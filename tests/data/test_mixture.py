"""Mixtures: exact shares at every row, passes of each source, and rows that are a function of their number alone."""

import collections
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.loader import Loader
from jaxtune.data.mixture import LARGEST, Mixture, source_order, whole_weights
from jaxtune.data.packing import window_rows
from jaxtune.errors import UserError

from .conftest import tokens_of


class Numbered:
    """Rows that say where they come from."""

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {'source': np.asarray(self.source), 'number': np.asarray(index)}


def mixture_of(sizes, weights):
    labels = [f's{i}' for i in range(len(sizes))]
    parts = {label: Numbered(i, size) for i, (label, size) in enumerate(zip(labels, sizes, strict=True))}
    return Mixture(parts, dict(zip(labels, weights, strict=True)))


def check_shares(order, shares, first=0):
    """Every source is less than a row off its share, after every row."""
    order, places = np.asarray(order), np.arange(first + 1, first + len(order) + 1)
    for number, share in enumerate(shares):
        taken = np.cumsum(order == number)
        # Exactly: |taken - n p/q| < 1 in whole numbers.
        p, q = share.numerator, share.denominator
        assert (np.abs(taken * q - places * p) < q).all()


def check_passes(stream, sizes):
    """No row of a source comes twice before all have come; each pass has an order of its own."""
    for number, size in enumerate(sizes):
        own = [row for source, row in stream if source == number]
        passes = [own[low : low + size] for low in range(0, len(own), size)]
        assert all(len(set(one)) == len(one) for one in passes)
        assert all(sorted(one) == list(range(size)) for one in passes if len(one) == size)
        whole = [tuple(one) for one in passes if len(one) == size]
        if size > 8:
            assert len(set(whole)) == len(whole)


def rows_of(loader, low, high, hosts=1):
    """`(source, row)` of batches low..high, each read by several hosts."""
    found, share = [], loader.batch_size // hosts
    for t in range(low, high):
        for host in range(hosts):
            part = loader.rows(t, host * share, (host + 1) * share)
            found += zip(part['source'].tolist(), part['number'].tolist(), strict=True)
    return found


def test_three_sources_over_2000_steps():
    sizes, weights, steps, batch = (5003, 701, 90), (0.7, 0.2, 0.1), 2000, 8
    stream = rows_of(Loader(mixture_of(sizes, weights), batch, seed=3), 0, steps)
    assert len(stream) == steps * batch
    check_shares([source for source, _ in stream], [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)])
    check_passes(stream, sizes)
    counts = collections.Counter(source for source, _ in stream)
    assert [counts[i] for i in range(3)] == [11200, 3200, 1600]
    for hosts in (1, 2, 4):  # and killed and begun again, by a loader that has read nothing before
        again = Loader(mixture_of(sizes, weights), batch, seed=3)
        assert rows_of(again, 1234, 1500, hosts) == stream[1234 * batch : 1500 * batch]
        assert rows_of(again, 7, 9, hosts) == stream[7 * batch : 9 * batch]
    assert rows_of(Loader(mixture_of(sizes, weights), batch, seed=4), 0, 20) != stream[: 20 * batch]


def test_no_document_comes_twice_in_an_epoch_of_packed_rows():
    rng = np.random.default_rng(0)
    parts = {label: window_rows(tokens_of(rng.integers(2, 15, n)), 16) for label, n in (('a', 90), ('b', 40))}
    mixture = Mixture(parts, {'a': 1, 'b': 3})
    loader, epoch = Loader(mixture, 4), collections.defaultdict(list)
    for t, row in itertools.product(range(100), range(4)):
        label, _ = mixture.find(4 * t + row)
        batch = loader.rows(t, row, row + 1)
        starts = (batch['positions'][0] == 0) & (batch['segment_ids'][0] > 0)
        epoch[label].append(batch['tokens'][0][starts].tolist())  # a document's first token tells which it is
    for label, rows in epoch.items():
        size = len(parts[label])
        for low in range(0, len(rows) - size, size):
            seen = [document for row in rows[low : low + size] for document in row]
            assert len(set(seen)) == len(seen) == parts[label].tokens.documents


weight = st.one_of(
    st.integers(1, 50),
    st.floats(1e-2, 1e2, allow_nan=False).map(lambda value: float(f'{value:.3g}')),
    st.sampled_from([0.7, 0.2, 0.1, 1 / 3, 1e-3]),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(weight, st.integers(1, 40)), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_shares_are_exact_and_passes_whole_for_any_weights_and_sizes(sources, seed):
    weights, sizes = zip(*sources, strict=True)
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [part / sum(exact) for part in exact]
    if math.lcm(*(share.denominator for share in shares)) > 20_000:
        weights = [math.ceil(share * 1000) for share in shares]
        shares = [Fraction(weight, sum(weights)) for weight in weights]
    mixture = mixture_of(sizes, weights)
    assert list(mixture.shares.values()) == shares
    check_shares(mixture.order, shares)
    assert collections.Counter(mixture.order.tolist()) == dict(enumerate(mixture.counts.values()))
    loader, count = Loader(mixture, 5, seed=seed), 120
    stream = rows_of(loader, 0, count // 5)
    check_passes(stream, sizes)
    check_shares([source for source, _ in stream], shares)
    # Any row, however far, is found without those before it.
    far = len(mixture.order) * 10**9 + 3
    assert mixture.find(far)[0] == mixture.find(3)[0]
    taken = mixture.taken(far)
    assert sum(taken.values()) == far
    assert mixture.find(far)[1] == taken[mixture.find(far)[0]]
    assert all(abs(n - far * share) < 1 for n, share in zip(taken.values(), shares, strict=True))
    at = loader.rows(far // 5, 0, 5)
    assert at['source'].tolist() == [int(mixture.find(far // 5 * 5 + i)[0][1:]) for i in range(5)]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_the_order_keeps_every_window(counts):
    order = source_order(counts)
    assert len(order) == sum(counts)
    check_shares(order, [Fraction(count, sum(counts)) for count in counts])


def test_the_order_of_a_source_depends_on_nothing_but_seed_and_label():
    alone = Mixture({'a': Numbered(0, 30)}, {'a': 1})
    beside = Mixture({'a': Numbered(0, 30), 'b': Numbered(1, 7)}, {'a': 1, 'b': 9})
    own = [[row for source, row in rows_of(Loader(rows, 5, 1), 0, 30) if source == 0] for rows in (alone, beside)]
    assert own[0][: len(own[1])] == own[1]
    assert len(own[1]) == 15


def test_weights_mean_what_they_read_as():
    assert whole_weights({'a': 0.7, 'b': 0.2, 'c': 0.1}) == {'a': 7, 'b': 2, 'c': 1}
    assert whole_weights({'a': 3, 'b': 1}) == {'a': 3, 'b': 1}
    assert whole_weights({'a': 1e9, 'b': 1e9}) == {'a': 1, 'b': 1}


def test_weights_of_no_common_size_are_taken_to_the_nearest():
    weights = {'a': 0.123456789, 'b': 0.5, 'c': 1.000000007}
    whole = whole_weights(weights)
    assert sum(whole.values()) == LARGEST
    for label, given_weight in weights.items():
        assert abs(whole[label] / LARGEST - given_weight / sum(weights.values())) < 1 / LARGEST


def test_what_is_too_little_is_refused():
    with pytest.raises(UserError, match=r'data.train.a.weight=1e-09: less than a 1,048,576th'):
        whole_weights({'a': 1e-9, 'b': 1.0})
    with pytest.raises(UserError, match="the source 'b' gives no rows"):
        Mixture({'a': Numbered(0, 3), 'b': Numbered(1, 0)}, {'a': 1, 'b': 1})


def test_what_a_run_takes_of_each_source():
    mixture = mixture_of((100, 20), (0.75, 0.25))
    assert len(mixture) == 120
    assert mixture.taken(8) == {'s0': 6, 's1': 2}
    assert mixture.epochs(400) == {'s0': 3.0, 's1': 5.0}
