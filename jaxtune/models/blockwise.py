"""Attention by blocks in plain XLA: memory of one block of scores, and no work on blocks that causality hides.

The backward pass computes the scores again from the saved log-sum-exp (FlashAttention, Dao et al. 2022,
arXiv:2205.14135). It walks over blocks of keys with the scores transposed (`[keys, queries]`), so that of its five
products only one contracts the leading dimension of both factors: that one XLA:CPU computes at a third of the speed
unless its result is laid out `[head_dim, queries]`, as it is here.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# What the backward pass reads; a remat policy that saves these never runs the forward pass of attention twice.
SAVED_NAMES = ('attention_q', 'attention_k', 'attention_v', 'attention_out', 'attention_lse')

_HIDDEN = -1e30  # the score of a pair that may not see each other
_LOWEST = -1e20  # a row's largest score is at least this, so that exp(_HIDDEN - largest) is 0 in an empty row too


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Who sees whom, and how scores are made: what is fixed when attention is traced.

    Attributes:
      scale: factor on the scores.
      budget: bytes of scores to hold at a time.
      softcap: `softcap * tanh(scores / softcap)` (Gemma 2), or None.
      window: a static sliding window, or None (none, or a traced one).
      causal: keys after the query are hidden.
      aligned: queries and keys are the same tokens in the same order, so blocks beyond the diagonal can be left out.
    """

    scale: float
    budget: int
    softcap: float | None = None
    window: int | None = None
    causal: bool = True
    aligned: bool = True


class Places(NamedTuple):
    """Positions and segments of queries `[batch, length]` and keys `[batch, keys]`, and a traced window or None."""

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array
    k_segments: jax.Array
    window: jax.Array | None = None


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, pattern: Pattern) -> jax.Array:
    """Attention with grouped queries.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; heads are a multiple of kv_heads and are never repeated in memory.
      v: like `k`.
      places: positions, segments and window; segment 0 sees nothing.
      pattern: the rest.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `q`; rows that see no key are 0.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    q, k, v = (checkpoint_name(x, f'attention_{name}') for x, name in zip((q, k, v), 'qkv', strict=True))
    out = _attention(pattern, q, k, v, places)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _block(length: int, smallest: int, row_bytes: int) -> int:
    """Size of a block: an eighth of the length, less where a block's scores of one head would pass 256 MiB."""
    size = max(smallest, -(-length // 8))
    if size * row_bytes > 2**28:
        size = max(smallest, -(-length // 32), 2**28 // row_bytes)
    return min(length, -(-size // 128) * 128) if length > smallest else length


def _by_rows(pattern: Pattern, function, q, k, block: int, *arrays):
    """Maps a function of a few batch rows, or of one row's few heads, over all of them."""
    batch, kv_heads, groups, length, _ = q.shape
    wide = k.shape[2] if block < length or not pattern.aligned else length
    row = kv_heads * groups * min(block, length) * wide * 4
    rows = max((n for n in range(1, batch + 1) if batch % n == 0 and n * row <= pattern.budget), default=1)
    if rows == batch:
        return function(*arrays)
    split = [jax.tree.map(lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), array) for array in arrays]
    out = lax.map(lambda xs: function(*xs), tuple(split))
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), out)


def _visible(pattern: Pattern, places: Places, window, queries: slice, keys: slice, transposed: bool) -> jax.Array:
    """Whether a query sees a key, `[batch, 1, queries, 1, keys]` broadcastable, or keys before queries."""

    def pair(of_queries, of_keys):
        of_queries, of_keys = of_queries[:, queries], of_keys[:, keys]
        if transposed:
            return of_queries[:, None, None, None, :], of_keys[:, None, :, None, None]
        return of_queries[:, None, None, :, None], of_keys[:, None, None, None, :]

    q_segments, k_segments = pair(places.q_segments, places.k_segments)
    q_positions, k_positions = pair(places.q_positions, places.k_positions)
    # A key of segment -1 is everyone's, one of segment 0 nobody's.
    seen = ((q_segments == k_segments) | (k_segments < 0)) & (q_segments != 0)
    if pattern.causal:
        seen &= k_positions <= q_positions
    if window is not None:
        seen &= q_positions - k_positions < window
        if not pattern.causal:
            seen &= k_positions - q_positions < window
    return seen


def _scores(pattern: Pattern, product, seen):
    """Masked scores, and the derivative of the cap at them (None without a cap)."""
    scores, slope = product * pattern.scale, None
    if pattern.softcap is not None:
        capped = jnp.tanh(scores / pattern.softcap)
        scores, slope = capped * pattern.softcap, 1.0 - jnp.square(capped)
    return jnp.where(seen, scores, _HIDDEN), slope


def _dot(a, b, contract: tuple[int, int]):
    """Product over the leading two dimensions (rows, kv heads) as a batch, in float32."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_rows(pattern: Pattern, window, q, k, v, places: Places):
    rows, kv_heads, groups, length, width = q.shape
    keys = k.shape[2]
    size = _block(length, 256, groups * keys * 4)
    outs, lses = [], []
    for low in range(0, length, size):
        high = min(length, low + size)
        first, last = 0, keys
        if pattern.aligned and pattern.causal:
            first = max(0, low - pattern.window + 1) if pattern.window is not None else 0
            last = high
        block = q[:, :, :, low:high].reshape(rows, kv_heads, groups * (high - low), width)
        product = _dot(block, k[:, :, first:last], (3, 3))
        product = product.reshape(rows, kv_heads, groups, high - low, last - first)
        seen = _visible(pattern, places, window, slice(low, high), slice(first, last), False)
        scores, _ = _scores(pattern, product, seen)
        largest = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST)
        exps = jnp.exp(scores - largest)
        total = exps.sum(-1, keepdims=True)
        flat = exps.reshape(rows, kv_heads, groups * (high - low), last - first).astype(v.dtype)
        out = _dot(flat, v[:, :, first:last], (3, 2)).reshape(*total.shape[:-1], width)
        empty = total == 0
        outs.append((out / jnp.where(empty, 1.0, total)).astype(q.dtype))
        lses.append(jnp.where(empty, -_HIDDEN, largest + jnp.log(jnp.where(empty, 1.0, total)))[..., 0])
    return jnp.concatenate(outs, 3), jnp.concatenate(lses, 3)


def _backward_rows(pattern: Pattern, window, q, k, v, places: Places, out, lse, d_out):
    rows, kv_heads, groups, length, width = q.shape
    keys = k.shape[2]
    size = _block(keys, 128, groups * length * 4)
    # A product with ones: XLA:CPU's own reduction of a fused product of this many dimensions is ten times slower.
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = jnp.dot(product.reshape(-1, width), jnp.ones(width, jnp.float32), precision=lax.Precision.HIGHEST)
    delta = delta.reshape(rows, kv_heads, groups, length)
    d_q = jnp.zeros((rows, kv_heads, width, groups, length), jnp.float32)
    d_ks, d_vs = [], []
    for low in range(0, keys, size):
        high = min(keys, low + size)
        first, last = 0, length
        if pattern.aligned and pattern.causal:
            first = low
            last = min(length, high + pattern.window - 1) if pattern.window is not None else length

        def queries(x, first=first, last=last):
            return x[:, :, :, first:last].reshape(rows, kv_heads, groups * (last - first), *x.shape[4:])

        k_block, v_block, q_block, d_block = k[:, :, low:high], v[:, :, low:high], queries(q), queries(d_out)
        shape = (rows, kv_heads, high - low, groups, last - first)
        seen = _visible(pattern, places, window, slice(first, last), slice(low, high), True)
        scores, slope = _scores(pattern, _dot(k_block, q_block, (3, 3)).reshape(shape), seen)
        chances = jnp.exp(scores - lse[:, :, None, :, first:last])
        d_chances = _dot(v_block, d_block, (3, 3)).reshape(shape)
        d_scores = chances * (d_chances - delta[:, :, None, :, first:last]) * pattern.scale
        if slope is not None:
            d_scores = d_scores * slope
        flat = (rows, kv_heads, high - low, groups * (last - first))
        chances, d_scores = chances.reshape(flat).astype(q.dtype), d_scores.reshape(flat).astype(q.dtype)
        d_vs.append(_dot(chances, d_block, (3, 2)).astype(v.dtype))
        d_ks.append(_dot(d_scores, q_block, (3, 2)).astype(k.dtype))
        part = _dot(k_block, d_scores, (2, 2)).reshape(rows, kv_heads, width, groups, last - first)
        d_q = d_q.at[..., first:last].add(part)
    d_q = d_q.transpose(0, 1, 3, 4, 2).astype(q.dtype)
    return d_q, jnp.concatenate(d_ks, 2), jnp.concatenate(d_vs, 2)


def _split_window(pattern: Pattern, places: Places):
    """The window to mask by, and the places without it (it has no batch dimension to be mapped over)."""
    window = pattern.window if places.window is None else places.window
    return window, places._replace(window=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(pattern: Pattern, q, k, v, places: Places):
    return _forward(pattern, q, k, v, places)[0]


def _forward(pattern: Pattern, q, k, v, places: Places):
    window, rest = _split_window(pattern, places)
    block = _block(q.shape[3], 256, q.shape[2] * k.shape[2] * 4)
    function = functools.partial(_forward_rows, pattern, window)
    out, lse = _by_rows(pattern, function, q, k, block, q, k, v, rest)
    out, lse = checkpoint_name(out, 'attention_out'), checkpoint_name(lse, 'attention_lse')
    return out, (q, k, v, places, out, lse)


def _backward(pattern: Pattern, residuals, d_out):
    q, k, v, places, out, lse = residuals
    window, rest = _split_window(pattern, places)
    block = _block(k.shape[2], 128, q.shape[2] * q.shape[3] * 4)
    function = functools.partial(_backward_rows, pattern, window)
    gradients = _by_rows(pattern, function, q, k, block, q, k, v, rest, out, lse, d_out)
    return (*gradients, None)


_attention.defvjp(_forward, _backward)
