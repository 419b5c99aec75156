"""Attention by blocks in plain XLA: memory of one block of scores, and no work on blocks that causality hides.

The backward pass computes the scores again from the saved log-sum-exp (FlashAttention, Dao et al. 2022,
arXiv:2205.14135). It walks over blocks of keys; their gradients are made as `[head_dim, keys]` from queries laid as
`[head_dim, length]`, so that no product contracts the leading dimension of both factors: those XLA:CPU computes at half
the speed.

Queries and keys are turned by their rotary angles and laid out by heads here, a few batch rows at a time, and gradients
laid back: what is moved then is in a CPU's cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.no_fuse import no_fuse
from jaxtune.models.rope import Angles, rotate

# What the backward pass reads; a remat policy that saves these never runs the forward pass of attention twice.
SAVED_NAMES = ('attention_q', 'attention_k', 'attention_v', 'attention_out', 'attention_lse')

MASK_VALUE = -1e30  # the score of a pair that may not see each other
_LOWEST = -1e20  # a row's largest score is at least this, so that exp(MASK_VALUE - largest) is 0 in an empty row too
_SMALLEST = 128  # queries or keys of a block, where there are as many
_LARGEST = 3 * 2**25  # bytes of a block's scores, of all heads of one row


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

    def rows(self, batch: int, row_bytes: int) -> int:
        """How many batch rows to take at a time where a block of one row's scores has `row_bytes`."""
        return max((n for n in range(1, batch + 1) if batch % n == 0 and n * row_bytes <= self.budget), default=1)


class Places(NamedTuple):
    """Where queries and keys are.

    Attributes:
      q_positions, q_segment_ids: `[batch, length]` int32.
      k_positions, k_segment_ids: `[batch, keys]` int32.
      q_angles, k_angles: what queries and keys are turned by, or None.
      window: a traced window, or None.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segment_ids: jax.Array
    k_segment_ids: jax.Array
    q_angles: Angles | None = None
    k_angles: Angles | None = None
    window: jax.Array | None = None


def blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, pattern: Pattern, sinks: jax.Array | None = None
) -> jax.Array:
    """Attention with grouped queries.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; heads are a multiple of kv_heads and are never repeated in memory.
      v: like `k`.
      places: positions, segments, angles and window; segment 0 sees nothing.
      pattern: the rest.
      sinks: float32 `[heads]`, a score of each head that takes part in its softmax and adds nothing, or None.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `q`; rows that see no key are 0.
    """
    batch, length, _, head_dim = q.shape
    chex.assert_shape(k, (batch, None, None, head_dim), custom_message='k')
    chex.assert_shape(v, k.shape, custom_message='v')
    chex.assert_is_divisible(q.shape[2], k.shape[2], custom_message='heads of q by those of k')
    for name, shape in (('q', (batch, length)), ('k', k.shape[:2])):
        positions, segment_ids = getattr(places, f'{name}_positions'), getattr(places, f'{name}_segment_ids')
        chex.assert_shape(positions, shape, custom_message=f'places.{name}_positions')
        chex.assert_shape(segment_ids, shape, custom_message=f'places.{name}_segment_ids')
    q, k, v = (checkpoint_name(x, f'attention_{name}') for x, name in zip((q, k, v), 'qkv', strict=True))
    return _attention(pattern, q, k, v, sinks, places)


def _cut(count: int, row_bytes: int) -> int:
    """Into how many equal parts to cut a block of `count` rows of scores, so that one has at most 96 MiB."""
    least = -(-count * row_bytes // _LARGEST)
    if least < 2:
        return 1
    return next((n for n in range(least, 4 * least) if count % n == 0 and count // n >= 8), 1)


def _in_parts(x: jax.Array, axis: int, count: int) -> jax.Array:
    """`[..., length, ...]` as `[count, ..., length / count, ...]`."""
    cut = x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """Undoes `_in_parts`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _block(length: int, row_bytes: int) -> int:
    """Size of a block: an eighth of the length, less where a block's scores of one head would pass 256 MiB."""
    size = max(_SMALLEST, -(-length // 8))
    if size * row_bytes > 2**28:
        size = max(_SMALLEST, -(-length // 32), 2**28 // row_bytes)
    return min(length, -(-size // _SMALLEST) * _SMALLEST)


def _by_rows(rows: int, function: Callable[..., Any], arrays: tuple, *places: Any) -> Any:
    """Maps a function of a few batch rows over all of them.

    Args:
      rows: how many at a time; divides the batch.
      function: of the rows' part of every array, and of every tree in `places`.
      arrays: queries, keys, and others `[batch, length, heads, width]`.
      places: trees of what is small.
    """
    batch = arrays[0].shape[0]
    if rows == batch:
        return function(*arrays, *places)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch // rows, rows, *x.shape[1:])

    # A dimension of 1 may lie anywhere: XLA would lay it out in two ways, and copy the arrays from one to the other.
    # What is small is read in the loops of vectors that make scores, where a slice without it would not be a vector.
    alone = rows == 1

    def mapped(xs: Any) -> Any:
        arrays, places = xs
        out = function(*(x[None] if alone else x for x in arrays), *places)
        return jax.tree.map(lambda x: x[0], out) if alone else out

    out = lax.map(mapped, (arrays if alone else jax.tree.map(split, arrays), jax.tree.map(split, places)))
    return out if alone else jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), out)


def _by_heads(x: jax.Array, angles: Angles | None, kv_heads: int) -> jax.Array:
    """`[rows, length, heads, width]`, turned, as `[rows, kv_heads, groups, length, width]`."""
    rows, length, heads, width = x.shape

    def change(x: jax.Array, angles: Angles | None) -> jax.Array:
        return rotate(x, angles).reshape(rows, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)

    return no_fuse(change)(x, angles)


def _by_tokens(x: jax.Array, angles: Angles | None) -> jax.Array:
    """The transpose of `_by_heads`: turning is linear, and its transpose turns back."""
    rows, kv_heads, groups, length, width = x.shape
    back = None if angles is None else (angles[0], -angles[1])

    def change(x: jax.Array, back: Angles | None) -> jax.Array:
        return rotate(x.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * groups, width), back)

    return no_fuse(change)(x, back)


def _laid_out(q: jax.Array, k: jax.Array, v: jax.Array, places: Places) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[rows, kv_heads, groups, length, width]`, keys and values `[rows, kv_heads, keys, width]`."""
    q, k, v = (
        _by_heads(x, angles, k.shape[2]) for x, angles in ((q, places.q_angles), (k, places.k_angles), (v, None))
    )
    return q, k[:, :, 0], v[:, :, 0]


def _columns(x: jax.Array) -> jax.Array:
    """`[..., length, width]` as `[..., width, length]`, or the other way round."""
    return no_fuse(lambda x: x.swapaxes(-1, -2))(x)


class _Tokens(NamedTuple):
    """Positions and segments of queries or keys, `[batch, length]` each."""

    positions: jax.Array
    segment_ids: jax.Array

    def part(self, first: int, last: int) -> '_Tokens':
        return _Tokens(self.positions[:, first:last], self.segment_ids[:, first:last])

    def parts(self, count: int) -> '_Tokens':
        return _Tokens(*(_in_parts(x, 1, count) for x in self))


def _visible(pattern: Pattern, window: int | jax.Array | None, queries: _Tokens, keys: _Tokens) -> jax.Array:
    """Whether a query sees a key, `[batch, 1, 1, queries, keys]`."""
    q_positions, q_segment_ids = (x[:, None, None, :, None] for x in queries)
    k_positions, k_segment_ids = (x[:, None, None, None, :] for x in keys)
    # A key of segment -1 is everyone's, one of segment 0 nobody's.
    seen = ((q_segment_ids == k_segment_ids) | (k_segment_ids < 0)) & (q_segment_ids != 0)
    if pattern.causal:
        seen &= k_positions <= q_positions
    if window is not None:
        seen &= q_positions - k_positions < window
        if not pattern.causal:
            seen &= k_positions - q_positions < window
    return seen


def _scores(pattern: Pattern, product: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores, and the derivative of the cap at them (None without a cap)."""
    scores, slope = product * pattern.scale, None
    if pattern.softcap is not None:
        capped = jnp.tanh(scores / pattern.softcap)
        scores, slope = capped * pattern.softcap, 1.0 - jnp.square(capped)
    return jnp.where(seen, scores, MASK_VALUE), slope


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over the leading two dimensions (rows, kv heads) as a batch, in float32."""
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_rows(
    pattern: Pattern,
    window: int | jax.Array | None,
    sinks: jax.Array | None,
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
) -> tuple[jax.Array, jax.Array]:
    q, k, v = _laid_out(q, k, v, places)
    rows, kv_heads, groups, length, width = q.shape
    keys = k.shape[2]
    if sinks is not None:
        sinks = sinks.reshape(1, kv_heads, groups, 1, 1)
    of_queries = _Tokens(places.q_positions, places.q_segment_ids)
    of_keys = _Tokens(places.k_positions, places.k_segment_ids)

    def attend(q: jax.Array, queries: _Tokens, k: jax.Array, v: jax.Array, seen_by: _Tokens) -> tuple[Any, Any]:
        """Outputs `[rows, kv_heads, groups, queries, width]` and log-sum-exps of some queries."""
        shape = (rows, kv_heads, groups, q.shape[3], k.shape[2])
        flat = (rows, kv_heads, groups * q.shape[3], k.shape[2])
        product = _dot(q.reshape(*flat[:3], width), k, (3, 3)).reshape(shape)
        scores, _ = _scores(pattern, product, _visible(pattern, window, queries, seen_by))
        largest = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST if sinks is None else sinks)
        exps = jnp.exp(scores - largest)
        total = exps.sum(-1, keepdims=True)
        empty = total == 0
        if sinks is not None:
            total = total + jnp.exp(sinks - largest)
        out = _dot(exps.reshape(flat).astype(v.dtype), v, (3, 2)).reshape(*total.shape[:-1], width)
        lse = jnp.where(empty, -MASK_VALUE, largest + jnp.log(jnp.where(empty, 1.0, total)))[..., 0]
        return (out / jnp.where(empty, 1.0, total)).astype(q.dtype), lse

    outs, lses = [], []
    for low in range(0, length, size):
        high = min(length, low + size)
        first, last = 0, keys
        if pattern.aligned and pattern.causal:
            first = max(0, low - pattern.window + 1) if pattern.window is not None else 0
            last = high
        block, queries = q[:, :, :, low:high], of_queries.part(low, high)
        seen_by = (k[:, :, first:last], v[:, :, first:last], of_keys.part(first, last))
        count = _cut(high - low, rows * kv_heads * groups * (last - first) * 4)
        if count == 1:
            out, lse = attend(block, queries, *seen_by)
        else:
            parts = (_in_parts(block, 3, count), queries.parts(count))
            out, lse = lax.map(lambda part, seen_by=seen_by: attend(*part, *seen_by), parts)
            out, lse = _joined(out, 3), _joined(lse, 3)
        outs.append(out)
        lses.append(lse)
    return _by_tokens(jnp.concatenate(outs, 3), None), jnp.concatenate(lses, 3)


def _backward_rows(
    pattern: Pattern,
    window: int | jax.Array | None,
    sinks: jax.Array | None,
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
    places: Places,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    # A product with ones: XLA:CPU's own reduction of a fused product of this many dimensions is ten times slower.
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    ones = jnp.ones(product.shape[-1], jnp.float32)
    delta = jnp.dot(product.reshape(-1, ones.size), ones, precision=lax.Precision.HIGHEST)
    delta = _by_heads(delta.reshape(*product.shape[:-1], 1), None, k.shape[2])
    d_out = _by_heads(d_out, None, k.shape[2])
    q, k, v = _laid_out(q, k, v, places)
    rows, kv_heads, groups, length, width = q.shape
    keys = k.shape[2]
    q_columns, d_columns = _columns(q), _columns(d_out)

    def queries(x: jax.Array, first: int, last: int) -> jax.Array:
        return x[:, :, :, first:last].reshape(rows, kv_heads, groups * (last - first), width)

    def columns(x: jax.Array, first: int, last: int) -> jax.Array:
        return x[..., first:last].swapaxes(2, 3).reshape(rows, kv_heads, width, groups * (last - first))

    of_queries = _Tokens(places.q_positions, places.q_segment_ids)
    of_keys = _Tokens(places.k_positions, places.k_segment_ids)

    def pull(first: int, last: int, k: jax.Array, v: jax.Array, seen_by: _Tokens) -> tuple[Any, Any, Any]:
        """Gradients of queries `first` to `last`, and of some keys and values, `[rows, kv_heads, width, keys]`."""
        shape = (rows, kv_heads, groups, last - first, k.shape[2])
        flat = (rows, kv_heads, groups * (last - first), k.shape[2])
        seen = _visible(pattern, window, of_queries.part(first, last), seen_by)
        scores, slope = _scores(pattern, _dot(queries(q, first, last), k, (3, 3)).reshape(shape), seen)
        chances = jnp.exp(scores - lse[:, :, :, first:last, None])
        d_chances = _dot(queries(d_out, first, last), v, (3, 3)).reshape(shape)
        d_scores = chances * (d_chances - delta[:, :, :, first:last]) * pattern.scale
        if slope is not None:
            d_scores = d_scores * slope
        chances, d_scores = chances.reshape(flat).astype(q.dtype), d_scores.reshape(flat).astype(q.dtype)
        d_v = _dot(columns(d_columns, first, last), chances, (3, 2)).astype(v.dtype)
        d_k = _dot(columns(q_columns, first, last), d_scores, (3, 2)).astype(k.dtype)
        return _dot(d_scores, k, (3, 2)).reshape(rows, kv_heads, groups, last - first, width), d_k, d_v

    d_q = jnp.zeros(q.shape, jnp.float32)
    d_ks, d_vs = [], []
    for low in range(0, keys, size):
        high = min(keys, low + size)
        first, last = 0, length
        if pattern.aligned and pattern.causal:
            first = low
            last = min(length, high + pattern.window - 1) if pattern.window is not None else length
        seen_by = (k[:, :, low:high], v[:, :, low:high], of_keys.part(low, high))
        count = _cut(high - low, rows * kv_heads * groups * (last - first) * 4)
        if count == 1:
            part, d_k, d_v = pull(first, last, *seen_by)
        else:

            def add(total: jax.Array, some: Any, first: int = first, last: int = last) -> tuple[jax.Array, Any]:
                part, d_k, d_v = pull(first, last, *some)
                return total + part, (d_k, d_v)

            zeros = jnp.zeros((rows, kv_heads, groups, last - first, width), jnp.float32)
            parts = (*(_in_parts(x, 2, count) for x in seen_by[:2]), seen_by[2].parts(count))
            part, (d_k, d_v) = lax.scan(add, zeros, parts)
            d_k, d_v = _joined(d_k, 3), _joined(d_v, 3)
        d_q = d_q.at[:, :, :, first:last].add(part)
        d_ks.append(d_k)
        d_vs.append(d_v)
    d_k, d_v = (_columns(jnp.concatenate(parts, 3))[:, :, None] for parts in (d_ks, d_vs))
    return (
        _by_tokens(d_q.astype(q.dtype), places.q_angles),
        _by_tokens(d_k, places.k_angles),
        _by_tokens(d_v, None),
        None if sinks is None else -delta[..., 0] * jnp.exp(sinks.reshape(1, kv_heads, groups, 1) - lse),
    )


def _split_window(pattern: Pattern, places: Places) -> tuple[int | jax.Array | None, Places]:
    """The window to mask by, and the places without it (it has no batch dimension to be mapped over)."""
    window = pattern.window if places.window is None else places.window
    return window, places._replace(window=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, places: Places
) -> jax.Array:
    return _forward(pattern, q, k, v, sinks, places)[0]


def _forward(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, places: Places
) -> tuple[jax.Array, tuple]:
    window, rest = _split_window(pattern, places)
    (batch, length, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    size = _block(length, heads // kv_heads * keys * 4)
    function = functools.partial(_forward_rows, pattern, window, sinks, size)
    out, lse = _by_rows(pattern.rows(batch, heads * size * keys * 4), function, (q, k, v), rest)
    out, lse = checkpoint_name(out, 'attention_out'), checkpoint_name(lse, 'attention_lse')
    return out, (q, k, v, sinks, places, out, lse)


def _backward(pattern: Pattern, residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, v, sinks, places, out, lse = residuals
    window, rest = _split_window(pattern, places)
    (batch, length, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    size = _block(keys, heads // kv_heads * length * 4)
    function = functools.partial(_backward_rows, pattern, window, sinks, size)
    *gradients, d_sinks = _by_rows(
        pattern.rows(batch, heads * size * length * 4), function, (q, k, v, out, d_out), rest, lse
    )
    # Of each row by itself, so that a row's part does not depend on how many are taken at a time.
    return (*gradients, None if d_sinks is None else d_sinks.sum(-1).sum(0).reshape(-1), None)


_attention.defvjp(_forward, _backward)
