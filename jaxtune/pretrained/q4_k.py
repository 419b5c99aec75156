"""ggml's Q4_K: 4.5 bits a weight, in super-blocks of 256 weights that are eight blocks of 32.

A weight is `d * scale * code - dmin * minimum`: codes of four bits; a scale and a minimum of six bits for each block;
`d` and `dmin` in float16 for the super-block.
"""

import concurrent.futures
import os

import numpy as np

SUPER_BLOCK, BLOCK, BYTES = 256, 32, 144
_BLOCKS = SUPER_BLOCK // BLOCK
_CODES, _STEPS = 15, 63  # the largest code, and the largest scale and minimum
_CHUNK = 256  # super-blocks at a time: what is computed of them stays in a core's cache


def quantise(values: np.ndarray) -> np.ndarray:
    """Rows in Q4_K; all cores take part.

    Args:
      values: float32 `[..., columns]`, columns a multiple of 256.

    Returns:
      uint8 `[..., columns / 256 * 144]`.
    """
    blocks = values.reshape(-1, _BLOCKS, BLOCK)
    chunks = [blocks[start : start + _CHUNK] for start in range(0, len(blocks), _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy computes outside of Python's lock
        made = list(threads.map(_quantise, chunks))
    return np.concatenate(made).reshape(*values.shape[:-1], values.shape[-1] // SUPER_BLOCK * BYTES)


def _quantise(x: np.ndarray) -> np.ndarray:
    """Super-blocks `[count, 8, 32]` as uint8 `[count, 144]`."""
    # Along the last dimension NumPy computes many numbers at once: that is the blocks, not the weights in one.
    weights = np.ascontiguousarray(x.reshape(-1, BLOCK).T, np.float32)
    scales, minima = (fitted.reshape(-1, _BLOCKS) for fitted in _fit(weights))
    d, scale_codes = _six_bits(scales)
    dmin, minimum_codes = _six_bits(minima)
    step = (d.astype(np.float32)[:, None] * scale_codes).ravel()
    offset = (dmin.astype(np.float32)[:, None] * minimum_codes).ravel()
    codes = np.clip(np.rint((weights + offset) * _inverse(step)), 0, _CODES).astype(np.uint8)
    # Of each two blocks the first one's codes are the low halves of 32 bytes, the second one's the high halves.
    pairs = codes.T.reshape(len(x), _BLOCKS // 2, 2, BLOCK)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(x), -1)
    heads = np.stack([d, dmin], 1).astype('<f2').view(np.uint8)
    return np.concatenate([heads, _packed(scale_codes, minimum_codes), packed], 1)


def _fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum of each block, both >= 0, such that `scale * code - minimum` is nearest to its weights.

    Each of some roundings to codes gives a scale and a minimum by weighted least squares; the one of the least weighted
    squared error is taken. Larger weights count for more, as they do in a product.

    Args:
      x: `[32, blocks]`.

    Returns:
      Two arrays `[blocks]`.
    """
    low = np.minimum(x.min(0), 0)
    width = x.max(0) - low
    importance = np.abs(x) + np.sqrt(np.mean(x * x, 0))
    weighted = importance * x
    sum_w, sum_x = importance.sum(0), weighted.sum(0)
    shares = (x - low) * _inverse(width)  # of the block's width
    codes, product = np.empty_like(x), np.empty_like(x)

    def sums(levels: float) -> tuple[np.ndarray, ...]:
        """Weighted sums of the codes, of their squares, and of their products with the weights."""
        np.minimum(np.rint(np.multiply(shares, np.float32(levels), out=codes), out=codes), _CODES, out=codes)
        of_codes = np.multiply(importance, codes, out=product).sum(0)
        of_squares = np.multiply(product, codes, out=product).sum(0)
        return of_codes, of_squares, np.multiply(weighted, codes, out=product).sum(0)

    def error(scale: np.ndarray, minimum: np.ndarray, of: tuple[np.ndarray, ...]) -> np.ndarray:
        """The weighted squared error less that of codes that are all 0, which is the same for all roundings."""
        of_codes, of_squares, of_products = of
        linear = scale * of_products - minimum * sum_x + scale * minimum * of_codes
        return scale * scale * of_squares + minimum * minimum * sum_w - 2 * linear

    scale, minimum = width / _CODES, -low
    least = error(scale, minimum, sums(_CODES))
    for levels in np.arange(_CODES - 1, _CODES + 1.05, 0.1):
        of = of_codes, of_squares, of_products = sums(levels)
        inverse = _inverse(sum_w * of_squares - of_codes * of_codes)
        found = (sum_w * of_products - sum_x * of_codes) * inverse
        intercept = (of_squares * sum_x - of_codes * of_products) * inverse
        above = intercept > 0  # a minimum is stored without a sign: the line then goes through zero
        found = np.where(above, of_products * _inverse(of_squares), found)
        offset = np.where(above, 0, -intercept)
        reached = error(found, offset, of)
        better = (reached < least) & (found > 0)
        least = np.where(better, reached, least)
        scale, minimum = np.where(better, found, scale), np.where(better, offset, minimum)
    return scale, minimum


def _inverse(x: np.ndarray) -> np.ndarray:
    return np.divide(1, x, out=np.zeros_like(x), where=x > 0)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values `[count, 8]` >= 0 as a float16 `[count]` and multiples of it in six bits."""
    unit = values.max(-1) / _STEPS
    stored = unit.astype(np.float16)
    rounded = stored.astype(np.float32)
    return stored, np.clip(np.rint(values * _inverse(rounded)[:, None]), 0, _STEPS).astype(np.uint8)


def _packed(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of six bits `[count, 8]` in twelve bytes.

    Those of the first four blocks have a byte each, whose two high bits are those of the last four blocks; these have
    their low four bits in the last bytes, the scale's below the minimum's.
    """
    first, last = slice(0, 4), slice(4, 8)
    parts = (
        scales[:, first] | scales[:, last] >> 4 << 6,
        minima[:, first] | minima[:, last] >> 4 << 6,
        scales[:, last] & 15 | (minima[:, last] & 15) << 4,
    )
    return np.concatenate(parts, 1)
