"""FlashAttention for GPUs as Pallas kernels, compiled by Triton: packed rows without an array of pairs of tokens.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691). Each block of queries visits only the blocks of keys
from the first to the last that may hold a key it sees: by causality, the window, and the segments that both blocks
have. So a packed row costs what its documents cost by themselves, and any number of them is exact.

Scores are kept in base 2 (`exp2` is what the hardware has), and so is the log-sum-exp.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.blockwise import MASK_VALUE, Pattern, Places

_LOG2_E = math.log2(math.e)
_LOWEST = -1e20  # a row's largest score is at least this, so that exp2(MASK_VALUE - largest) is 0 in an empty row too
_EVERYTHING = 2**30  # a window beyond every position
_MULTIPLE = 64  # rows are padded to a multiple of this

LARGEST_HEAD = 256


class Tile(NamedTuple):
    """Queries and keys of a block, and warps that work on it."""

    queries: int
    keys: int
    warps: int


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What is fixed when the kernels are traced.

    Attributes:
      scale: factor on the scores.
      softcap: or None.
      windowed: there is a window.
      causal: keys after the query are hidden.
      sinks: each head has a sink.
      interpret: runs in Pallas' interpreter.
    """

    scale: float
    softcap: float | None
    windowed: bool
    causal: bool
    sinks: bool
    interpret: bool

    def scores(self, product: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Masked scores in base 2, and the derivative of the cap at them (None without a cap)."""
        slope = None
        if self.softcap is None:
            scores = product * (self.scale * _LOG2_E)
        else:
            capped = jnp.tanh(product * (self.scale / self.softcap))
            scores, slope = capped * (self.softcap * _LOG2_E), 1.0 - capped * capped
        return jnp.where(seen, scores, MASK_VALUE), slope

    def seen(
        self, rows: jax.Array, columns: jax.Array, q_ids: jax.Array, k_ids: jax.Array, window: jax.Array
    ) -> jax.Array:
        """Whether the queries at `rows` see the keys at `columns`, `[queries, keys]`."""
        seen = (q_ids[:, None] == k_ids[None, :]) & (q_ids != 0)[:, None]
        distance = rows[:, None] - columns[None, :]
        if self.causal:
            seen &= distance >= 0
        if self.windowed:
            seen &= distance < window
            if not self.causal:
                seen &= -distance < window
        return seen


def triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    pattern: Pattern,
    sinks: jax.Array | None = None,
    starts: tuple[jax.Array | int, ...] = (0,),
    interpret: bool = False,
) -> jax.Array:
    """Attention within one sequence on one GPU's rows, queries and heads; shapes as in `blockwise`.

    Args:
      q: `[batch, length, heads, head_dim]`, head_dim at most `LARGEST_HEAD`.
      k: `[batch, keys, kv_heads, head_dim]`.
      v: like `k`.
      places: segments, and a traced window; who comes before whom is told by the order of the tokens.
      pattern: the rest.
      sinks: float32 `[heads]`, or None.
      starts: the places among the keys of the first query, or of the first one of each half.
      interpret: runs in Pallas' interpreter.
    """
    length = q.shape[1]
    window = pattern.window if places.window is None else places.window
    kernel = _Kernel(pattern.scale, pattern.softcap, window is not None, pattern.causal, sinks is not None, interpret)
    border = length // len(starts)  # of queries that are not in a row
    numbers = (_EVERYTHING if window is None else window, starts[0], border, starts[-1] - (length - border))
    told = jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers])
    q, k, v = (checkpoint_name(x, f'attention_{name}') for x, name in zip((q, k, v), 'qkv', strict=True))
    if sinks is None:
        sinks = jnp.zeros(q.shape[2], jnp.float32)
    padded = [_padded(x) for x in (q, k, v, places.q_segment_ids, places.k_segment_ids)]
    return cast(jax.Array, _attention(kernel, *padded[:3], sinks, *padded[3:], told))[:, :length]


def _place(told: jax.Array, start: jax.Array) -> jax.Array:
    """The place among the keys of the query `start`, with which a block begins."""
    return start + jnp.where(start < told[2], told[1], told[3])


def _padded(x: jax.Array) -> jax.Array:
    """`[batch, length, ...]` with zeros up to a whole number of blocks: segment 0 sees nobody and is seen by nobody."""
    missing = -x.shape[1] % _MULTIPLE
    return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) if missing else x


def _tiles(head_dim: int, length: int) -> dict[str, Tile]:
    """Blocks that fit the shared memory of every card since compute capability 8.0."""
    wide = 128 if length % 128 == 0 else 64
    if head_dim <= 64:
        return {'forward': Tile(wide, 64, 4), 'keys': Tile(64, 64, 4), 'queries': Tile(64, 64, 4)}
    if head_dim <= 128:
        return {'forward': Tile(wide, 64, 8), 'keys': Tile(32, 64, 4), 'queries': Tile(64, 32, 4)}
    return {'forward': Tile(64, 32, 8), 'keys': Tile(32, 32, 8), 'queries': Tile(32, 32, 8)}


def _visits(kernel: _Kernel, tile: Tile, q_ids: jax.Array, k_ids: jax.Array, told: jax.Array, axis: int) -> jax.Array:
    """The first block to visit and the one after the last, int32 `[batch, blocks, 2]`.

    Args:
      kernel: who sees whom.
      tile: sizes of blocks.
      q_ids: `[batch, length]` segments.
      k_ids: `[batch, keys]`.
      told: the window, the place of the first query, the query from which on places lie another way, and how.
      axis: 1 = a block of queries visits blocks of keys, 0 = the other way round.
    """

    def segments(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        blocks = ids.reshape(*ids.shape[:1], -1, size)
        return jnp.where(blocks == 0, jnp.iinfo(jnp.int32).max, blocks).min(-1), blocks.max(-1)

    (q_least, q_most), (k_least, k_most) = segments(q_ids, tile.queries), segments(k_ids, tile.keys)
    may = (k_most[:, None, :] >= q_least[:, :, None]) & (k_least[:, None, :] <= q_most[:, :, None])
    first_query = _place(told, tile.queries * jnp.arange(q_least.shape[1], dtype=jnp.int32))[:, None]
    first_key = (tile.keys * jnp.arange(k_least.shape[1], dtype=jnp.int32))[None]
    if kernel.causal:
        may &= first_key <= first_query + tile.queries - 1
    if kernel.windowed:
        may &= first_query - (first_key + tile.keys - 1) < told[0]
        if not kernel.causal:
            may &= first_key - (first_query + tile.queries - 1) < told[0]
    count = may.shape[1 + axis]
    number = jnp.arange(count, dtype=jnp.int32)
    number = number[None, :] if axis else number[:, None]
    after = jnp.where(may, number + 1, 0).max(1 + axis)
    return jnp.stack([jnp.minimum(jnp.where(may, number, count).min(1 + axis), after), after], -1)


class _Head:
    """Loads and stores `[tokens, head_dim]` padded to a power of two, which Triton's blocks must be."""

    def __init__(self, head_dim: int) -> None:
        from jax.experimental.pallas import triton as plgpu  # slow to import

        self.width = max(16, 1 << (head_dim - 1).bit_length())
        self.real = head_dim
        self.gpu = plgpu

    def _mask(self) -> jax.Array | None:
        return None if self.width == self.real else (jnp.arange(self.width) < self.real)[None, :]

    def load(self, ref: Any, *index: Any) -> jax.Array:
        mask = self._mask()
        return self.gpu.load(ref.at[(*index, slice(None))], mask=mask, other=None if mask is None else 0.0)

    def store(self, ref: Any, value: jax.Array) -> None:
        self.gpu.store(ref, value.astype(ref.dtype), mask=self._mask())

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self.gpu.dot(a, b)


def _forward_kernel(kernel: _Kernel, tile: Tile, head: _Head, *refs: Any) -> None:
    from jax.experimental import pallas as pl  # slow to import

    told, visits, sinks, q_ids, k_ids, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    start = pl.program_id(0) * tile.queries
    rows = _place(told, start) + jnp.arange(tile.queries)
    ids = q_ids[pl.ds(start, tile.queries)]
    q = head.load(q_ref, slice(None))

    def visit(block: jax.Array, carry: tuple) -> tuple:
        out, largest, total = carry
        part = pl.ds(block * tile.keys, tile.keys)
        k = head.load(k_ref, part)
        columns = block * tile.keys + jnp.arange(tile.keys)
        scores, _ = kernel.scores(head.dot(q, k.T), kernel.seen(rows, columns, ids, k_ids[part], told[0]))
        new = jnp.maximum(largest, scores.max(-1))
        exps, shrink = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        v = head.load(v_ref, part)
        out = out * shrink[:, None] + head.dot(exps.astype(v.dtype), v)
        return out, new, total * shrink + exps.sum(-1)

    out = jnp.zeros((tile.queries, head.width), jnp.float32)
    # A sink is a key that every query sees, and whose value is 0.
    sink = sinks[pl.program_id(1)] * _LOG2_E if kernel.sinks else _LOWEST
    largest = jnp.full(tile.queries, sink, jnp.float32)
    total = jnp.full(tile.queries, 1.0 if kernel.sinks else 0.0, jnp.float32)
    out, largest, total = lax.fori_loop(visits[0], visits[1], visit, (out, largest, total))
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    head.store(out_ref, out / total[:, None])
    lse_ref[...] = jnp.where(empty, -MASK_VALUE, largest + jnp.log2(total))


def _pull(
    kernel: _Kernel,
    head: _Head,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Shares of the softmax and the gradient of the products of queries and keys, `[queries, keys]`."""
    scores, slope = kernel.scores(head.dot(q, k.T), seen)
    shares = jnp.exp2(scores - lse[:, None])
    d_scores = shares * (head.dot(d_out, v.T) - delta[:, None]) * kernel.scale
    return shares, d_scores if slope is None else d_scores * slope


def _keys_kernel(kernel: _Kernel, tile: Tile, head: _Head, *refs: Any) -> None:
    """Gradients of a block of keys and values of one key head, over the query heads that share it."""
    from jax.experimental import pallas as pl  # slow to import

    told, visits, q_ids, k_ids, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_k_ref, d_v_ref = refs
    start = pl.program_id(0) * tile.keys
    columns, ids = start + jnp.arange(tile.keys), k_ids[pl.ds(start, tile.keys)]
    k, v = head.load(k_ref, slice(None)), head.load(v_ref, slice(None))
    first, count = visits[0], visits[1] - visits[0]

    def visit(number: jax.Array, carry: tuple) -> tuple:
        d_k, d_v = carry
        group, block = lax.div(number, count), first + lax.rem(number, count)
        part = pl.ds(block * tile.queries, tile.queries)
        q, d_out = head.load(q_ref, part, group), head.load(d_out_ref, part, group)
        rows = _place(told, block * tile.queries) + jnp.arange(tile.queries)
        seen = kernel.seen(rows, columns, q_ids[part], ids, told[0])
        shares, d_scores = _pull(kernel, head, seen, q, k, v, d_out, lse_ref[group, part], delta_ref[group, part])
        d_v += head.dot(shares.astype(d_out.dtype).T, d_out)
        return d_k + head.dot(d_scores.astype(q.dtype).T, q), d_v

    zeros = jnp.zeros((tile.keys, head.width), jnp.float32)
    d_k, d_v = lax.fori_loop(0, count * lse_ref.shape[0], visit, (zeros, zeros))
    head.store(d_k_ref, d_k)
    head.store(d_v_ref, d_v)


def _queries_kernel(kernel: _Kernel, tile: Tile, head: _Head, *refs: Any) -> None:
    """Gradients of a block of queries."""
    from jax.experimental import pallas as pl  # slow to import

    told, visits, q_ids, k_ids, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, d_q_ref = refs
    start = pl.program_id(0) * tile.queries
    rows, ids = _place(told, start) + jnp.arange(tile.queries), q_ids[pl.ds(start, tile.queries)]
    q, d_out, lse, delta = (
        head.load(q_ref, slice(None)),
        head.load(d_out_ref, slice(None)),
        lse_ref[...],
        delta_ref[...],
    )

    def visit(block: jax.Array, d_q: jax.Array) -> jax.Array:
        part = pl.ds(block * tile.keys, tile.keys)
        k, v = head.load(k_ref, part), head.load(v_ref, part)
        seen = kernel.seen(rows, block * tile.keys + jnp.arange(tile.keys), ids, k_ids[part], told[0])
        _, d_scores = _pull(kernel, head, seen, q, k, v, d_out, lse, delta)
        return d_q + head.dot(d_scores.astype(k.dtype), k)

    d_q = lax.fori_loop(visits[0], visits[1], visit, jnp.zeros((tile.queries, head.width), jnp.float32))
    head.store(d_q_ref, d_q)


class _Specs:
    """Which part of every array a program of a kernel is given: its grid is blocks x heads x batch rows."""

    def __init__(self, size: int, heads: int, width: int, share: int) -> None:
        from jax.experimental import pallas as pl  # slow to import

        self.told = pl.BlockSpec((4,), lambda i, h, b: (0,))
        self.visits = pl.BlockSpec((None, None, 2), lambda i, h, b: (b, i, 0))
        self.sinks = pl.BlockSpec((heads,), lambda i, h, b: (0,))
        # A program's own block of its head, and all tokens of its head, of its key head, or of its query heads.
        self.block = pl.BlockSpec((None, size, None, width), lambda i, h, b: (b, i, h, 0))
        self.number = pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, i))
        self.width, self.share, self.spec = width, share, pl.BlockSpec

    def ids(self, length: int) -> Any:
        return self.spec((None, length), lambda i, h, b: (b, 0))

    def shared(self, length: int) -> Any:
        """All tokens of the key head of a query head."""
        share = self.share
        return self.spec((None, length, None, self.width), lambda i, h, b: (b, 0, lax.div(h, share), 0))

    def group(self, length: int) -> Any:
        """All tokens of the query heads of a key head."""
        return self.spec((None, length, self.share, self.width), lambda i, h, b: (b, 0, h, 0))

    def numbers(self, length: int) -> Any:
        return self.spec((None, self.share, length), lambda i, h, b: (b, h, 0))


def _call(
    kernel: _Kernel, tile: Tile, body: Any, grid: tuple, given: list, specs: list, made: list, made_specs: list
) -> Any:
    from jax.experimental import pallas as pl  # slow to import
    from jax.experimental.pallas import triton as plgpu  # slow to import

    name = body.__name__.strip('_').removesuffix('_kernel')
    head = _Head(given[-1].shape[-1] if name == 'forward' else made[0].shape[-1])
    return pl.pallas_call(
        functools.partial(body, kernel, tile, head),
        grid=grid,
        in_specs=specs,
        out_specs=made_specs,
        out_shape=made,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=kernel.interpret,
        name=f'flash_{name}',
    )(*given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    kernel: _Kernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    told: jax.Array,
) -> jax.Array:
    return _forward(kernel, q, k, v, sinks, q_ids, k_ids, told)[0]


def _forward(
    kernel: _Kernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    told: jax.Array,
) -> tuple[jax.Array, tuple]:
    batch, length, heads, head_dim = q.shape
    keys = k.shape[1]
    tile = _tiles(head_dim, length)['forward']
    specs = _Specs(tile.queries, heads, _Head(head_dim).width, heads // k.shape[2])
    ids = (specs.ids(length), specs.ids(keys))
    out, lse = _call(
        kernel,
        tile,
        _forward_kernel,
        (length // tile.queries, heads, batch),
        [told, _visits(kernel, tile, q_ids, k_ids, told, 1), sinks, q_ids, k_ids, q, k, v],
        [specs.told, specs.visits, specs.sinks, *ids, specs.block, specs.shared(keys), specs.shared(keys)],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        [specs.block, specs.number],
    )
    out, lse = checkpoint_name(out, 'attention_out'), checkpoint_name(lse, 'attention_lse')
    return out, (q, k, v, sinks, q_ids, k_ids, told, out, lse)


def _backward(kernel: _Kernel, residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, v, sinks, q_ids, k_ids, told, out, lse = residuals
    (batch, length, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    tiles, width, share = _tiles(head_dim, length), _Head(head_dim).width, heads // kv_heads
    given = [q_ids, k_ids, q, k, v, d_out, lse, delta]

    tile = tiles['keys']
    specs = _Specs(tile.keys, heads, width, share)
    ids, group, numbers = (specs.ids(length), specs.ids(keys)), specs.group(length), specs.numbers(length)
    d_k, d_v = _call(
        kernel,
        tile,
        _keys_kernel,
        (keys // tile.keys, kv_heads, batch),
        [told, _visits(kernel, tile, q_ids, k_ids, told, 0), *given],
        [specs.told, specs.visits, *ids, group, specs.block, specs.block, group, numbers, numbers],
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        [specs.block, specs.block],
    )
    tile = tiles['queries']
    specs = _Specs(tile.queries, heads, width, share)
    shared = specs.shared(keys)
    (d_q,) = _call(
        kernel,
        tile,
        _queries_kernel,
        (length // tile.queries, heads, batch),
        [told, _visits(kernel, tile, q_ids, k_ids, told, 1), *given],
        [specs.told, specs.visits, *ids, specs.block, shared, shared, specs.block, specs.number, specs.number],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        [specs.block],
    )
    d_sinks = -(delta * jnp.exp2(sinks[:, None] * _LOG2_E - lse)).sum((0, 2)) if kernel.sinks else jnp.zeros_like(sinks)
    return d_q, d_k, d_v, d_sinks, None, None, None


_attention.defvjp(_forward, _backward)
