"""Splash attention's blocks: sizes that divide the row and fit, and the count of those that a mask needs."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxtune.models import splash_blocks
from jaxtune.models.splash_blocks import choose


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(
    blocks=st.integers(1, 300),
    shards=st.sampled_from([1, 2, 4]),
    row_bytes=st.sampled_from([128, 256, 512, 1024, 2048]),
    window=st.sampled_from([None, 100, 4096]),
    causal=st.booleans(),
)
def test_sizes_divide_the_row_and_fit(blocks, shards, row_bytes, window, causal):
    length = 128 * blocks * shards
    chosen = choose(length, shards, row_bytes, window, causal)
    for q, kv in filter(None, (chosen.forward, chosen.keys, chosen.queries)):
        assert blocks * 128 % q == length % kv == 0
        assert q * kv <= 2**21
        assert max(q, kv) * row_bytes <= 2**19
        assert kv % min(kv, 512) == 0
    if chosen.queries is None:
        assert length // chosen.keys[1] <= 4


def test_long_rows_have_large_blocks_and_short_ones_the_fused_kernel():
    assert choose(4096, 1, 256, None, True).forward == (1024, 1024)
    assert choose(4096, 1, 256, None, True).queries is None
    assert max(choose(32768, 1, 256, None, True).forward) == 2048
    assert choose(32768, 1, 256, None, True).queries is not None
    # Beside a window of 512 tokens a large block would be hidden for the most part.
    assert max(choose(32768, 1, 256, 512, True).forward) <= 512


def test_blocks_that_a_mask_needs():
    rows, columns = np.arange(1024)[:, None], np.arange(1024)
    for window in (None, 100, 256):
        for causal in (True, False) if window is None else (True,):
            seen = np.ones((1024, 1024), bool) if not causal else columns <= rows
            if window is not None:
                seen = seen & (rows - columns < window)
            for q, kv in ((128, 256), (256, 128), (512, 512)):
                expected = seen.reshape(1024 // q, q, 1024 // kv, kv).any((1, 3))
                assert splash_blocks._visited(1024, (q, kv), window, causal) == (expected.sum(), expected.size)
