"""NF4: what comes back is near what went in, and what the formula of its paper gives."""

import chex
import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.weights import Codec
from jaxtune.weights.blockwise8 import dynamic_map
from jaxtune.weights.nf4 import OUTER_BLOCK, VALUES

SHAPES = ((16, 32), (48, 6), (7, 5))  # `[in, out]`: whole blocks a row, several, and one ragged row
MATRICES = st.tuples(st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 30.0]), st.booleans())
_GAP = float(np.diff(VALUES).max()) / 2
_SCALE_GAP = float(np.diff(dynamic_map()).max()) / 2


def drawn(matrix):
    shape, seed, size, tails = matrix
    rng = np.random.default_rng(seed)
    return (size * (rng.standard_t(2, shape) if tails else rng.normal(size=shape))).astype(np.float32)


def round_trip(kernel, codec):
    leaf = codec.encode_kernel(kernel)
    return leaf, leaf.materialise()


_compiled = jax.jit(round_trip, static_argnums=1)


def reference(kernel, block, double_quant):
    """`(values, scales, absmax)` by the paper: nearest value of each block's weights over its largest."""
    rows = kernel.T if kernel.shape[0] % block == 0 else kernel.T.reshape(1, -1)
    blocks = -(-rows.shape[1] // block)
    padded = np.pad(rows, ((0, 0), (0, blocks * block - rows.shape[1]))).reshape(len(rows), blocks, block)
    absmax = scales = np.abs(padded).max(-1)
    normed = padded / np.maximum(absmax, np.finfo(np.float32).tiny)[..., None]
    codes = np.abs(normed[..., None] - VALUES).argmin(-1)
    if double_quant:
        offset, table = absmax.mean(dtype=np.float64).astype(np.float32), dynamic_map()
        rest = (absmax - offset).reshape(-1)
        outer = np.abs(np.pad(rest, (0, -len(rest) % OUTER_BLOCK)).reshape(-1, OUTER_BLOCK)).max(-1)
        outer = np.repeat(outer, OUTER_BLOCK)[: len(rest)]
        # bitsandbytes looks the nearest code up on a grid.
        grid = np.floor((rest / np.where(outer > 0, outer, 1) + 1) * 32767.5 + 0.5) / 32767.5 - 1
        nearest = table[np.abs(grid[:, None] - table).argmin(-1)]
        scales = (nearest * outer + offset).reshape(absmax.shape)
    wide = lambda x: np.repeat(x, block, -1)[:, : rows.shape[1]].reshape(kernel.T.shape).T  # noqa: E731
    values = (VALUES[codes] * scales[..., None]).reshape(len(rows), -1)[:, : rows.shape[1]]
    return values.reshape(kernel.T.shape).T, wide(scales), wide(absmax)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(MATRICES, st.sampled_from([16, 64]), st.booleans())
def test_a_round_trip_is_the_papers_formula_within_its_bound(matrix, block, double_quant):
    kernel = drawn(matrix)
    leaf, found = _compiled(kernel, Codec(block, double_quant))
    found = np.asarray(found)
    chex.assert_equal_shape([found, kernel, leaf])
    values, scales, absmax = reference(kernel, block, double_quant)
    # A weight half-way between two values may fall either way by rounding, and so may the scale of one block of 16.
    near = np.isclose(found, values, rtol=1e-5, atol=1e-6 * absmax.max())
    assert near.mean() > 0.96
    error = _GAP * absmax + np.abs(scales - absmax)
    if double_quant:
        spread = np.abs(absmax - absmax.mean()).max()
        assert (np.abs(scales - absmax) <= _SCALE_GAP * spread * (1 + 1e-4) + 1e-6 * absmax.max()).all()
        error = _GAP * absmax + _SCALE_GAP * spread
    assert (np.abs(found - kernel) <= error * (1 + 1e-4) + 1e-6 * absmax.max()).all()


class Variants(chex.TestCase):
    """With and without `jit`, and with arrays on the device or not, NF4 is the same bits."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_every_variant_encodes_alike(self):
        for shape, block in zip(SHAPES, (16, 16, 64), strict=True):
            kernel, codec = drawn((shape, 4, 0.02, True)), Codec(block)
            found = self.variant(lambda x, codec=codec: round_trip(x, codec))(kernel)
            chex.assert_trees_all_equal(found, _compiled(kernel, codec))
