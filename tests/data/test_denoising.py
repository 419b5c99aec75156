"""Cutting texts for an encoder-decoder: what the two parts hold, and how long they are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.denoising import MODES, Denoiser, denoisers

EOS = 1
SENTINELS = [-1 - i for i in range(1000)]


def restore(source, target, mode=False):
    """The text that a source and its target were cut from."""
    assert source[-1] == EOS
    assert target[-1] == EOS
    source, target = source[mode:-1].tolist(), target[:-1].tolist()
    if not any(token < 0 for token in source):
        return source + target
    spans, now = {}, None
    for token in target:
        if token < 0:
            now = spans[token] = []
        else:
            now.append(token)
    assert list(spans) == [token for token in source if token < 0] == SENTINELS[: len(spans)]
    assert all(spans.values())
    return [token for entry in source for token in (spans[entry] if entry < 0 else [entry])]


@given(
    length=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    density=st.floats(0.01, 0.9),
    mean_length=st.floats(1, 20),
)
def test_source_and_target_give_the_text_back(length, seed, density, mean_length):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 1000, length).astype(np.int32)
    denoiser = Denoiser(density, mean_length)
    source, target = denoiser.cut(tokens, np.random.default_rng(seed), SENTINELS, EOS)
    assert restore(source, target) == tokens.tolist()
    assert (len(source), len(target)) == denoiser.lengths(length)
    assert source.dtype == target.dtype == np.int32
    again = denoiser.cut(tokens, np.random.default_rng(seed), SENTINELS, EOS)
    assert all(np.array_equal(a, b) for a, b in zip((source, target), again, strict=True))


@given(length=st.integers(1, 200), seed=st.integers(0, 2**32), mode=st.sampled_from(['prefix', 'ul2']))
def test_other_modes_give_the_text_back_too(length, seed, mode):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 1000, length).astype(np.int32)
    for denoiser in denoisers(mode, 0.15, 3.0):
        source, target = denoiser.cut(tokens, rng, SENTINELS, EOS)
        if denoiser.mode:
            assert source[0] == SENTINELS[-1 - MODES.index(denoiser.mode)]
        assert restore(source, target, bool(denoiser.mode)) == tokens.tolist()
        most = denoiser.lengths(length)
        assert len(source) <= most[0]
        assert len(target) <= most[1]


@given(length=st.integers(8, 600), density=st.floats(0.05, 0.6), mean_length=st.floats(1, 10))
def test_raw_length_is_the_most_that_fits(length, density, mean_length):
    denoiser = Denoiser(density, mean_length)
    raw = denoiser.raw_length(length)
    assert denoiser.lengths(raw)[0] <= length < denoiser.lengths(raw + 1)[0]


def test_sizes_are_those_of_t5():
    denoiser = Denoiser(0.15, 3.0)
    # random_spans_helper(512, 0.15, 3.0, 1, 1) of T5's own preprocessing.
    assert denoiser.raw_length(512) == 568
    assert denoiser.lengths(568) == (512, 114)
    for seq_len in range(16, 600):
        assert denoiser.lengths(denoiser.raw_length(seq_len))[0] == seq_len


@pytest.mark.parametrize(('density', 'mean_length'), [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.3, 1.5)])
def test_density_and_mean_length_of_spans(density, mean_length):
    denoiser, length = Denoiser(density, mean_length), 10_000
    masks = np.stack([denoiser.mask(length, np.random.default_rng(seed)) for seed in range(100)])
    assert masks.mean() == pytest.approx(density, rel=0.01)
    starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert masks.sum() / starts.sum() == pytest.approx(mean_length, rel=0.01)
    # As likely everywhere but at the ends: a row begins with what stays and ends with noise.
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    middle = masks[:, 100:9900].mean()
    assert middle == pytest.approx(density, rel=0.01)


def test_all_ways_to_cut_are_as_likely():
    denoiser = Denoiser(0.5, 2.0)  # 8 tokens: 4 hidden in 2 spans, 3 x 3 ways
    masks = [tuple(denoiser.mask(8, np.random.default_rng(seed))) for seed in range(9000)]
    counts = np.array(list({mask: masks.count(mask) for mask in set(masks)}.values()))
    assert len(counts) == 9
    assert (abs(counts - 1000) < 5 * np.sqrt(1000)).all()


def test_a_prefix_ends_anywhere():
    (denoiser,) = denoisers('prefix', 0.15, 3.0)
    sizes = [len(denoiser.cut(np.arange(2, 12), np.random.default_rng(seed), [], EOS)[0]) for seed in range(900)]
    assert set(sizes) == set(range(2, 11))
    assert denoiser.raw_length(64) == 64
    assert denoiser.lengths(64) == (64, 64)
