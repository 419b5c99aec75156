"""Attention: picks an implementation, and runs it on each device's own rows and heads of a mesh."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.errors import UserError
from jaxtune.models import flash, flash_triton, zigzag
from jaxtune.models.blockwise import MASK_VALUE, SAVED_NAMES, Pattern, Places, blockwise
from jaxtune.models.rope import Angles, rotate
from jaxtune.parallel import BATCH_AXES, auto_axes, axis_size, dividing_axes, platform

__all__ = ['MASK_VALUE', 'SAVED_NAMES', 'KernelLog', 'attention', 'visible_softmax']

# Bytes of scores that the plain path holds at a time: what stays in a CPU's cache, or keeps an accelerator busy.
_BUDGET = {'cpu': 2**21}
_ACCELERATOR_BUDGET = 2**29


class KernelLog:
    """The attention kernels that the traces of one model chose, and why a faster one could not run where there are any.

    `models.build` makes one for each model; what traces the model's forward pass adds to it.

    Attributes:
      experts: the products that mixtures of experts chose.
      products: those that linear layers chose where there are several, and why not a faster one; reasons may be ''.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self.experts: list[str] = []
        self.products: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of their first traces: `xla`, `splash`, `triton`, `cudnn`."""
        return tuple(self._reasons)

    def add(self, name: str, reason: str = '') -> None:
        """Notes that a kernel was traced; `reason` is why it stood in for a faster one, '' where it did not."""
        self._reasons[name] = self._reasons.get(name) or reason

    def add_product(self, name: str, reason: str) -> None:
        """Notes which product a linear layer chose, as `Weight.product` says; '' = it had no choice."""
        if name:
            self.products[name] = self.products.get(name) or reason

    @property
    def products_line(self) -> str:
        """The products with their reasons, in words."""
        return _in_words(self.products)

    def __str__(self) -> str:
        return _in_words(self._reasons)


def _in_words(reasons: Mapping[str, str]) -> str:
    return ', '.join(f'{name} ({reason})' if reason else name for name, reason in reasons.items())


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segment_ids: jax.Array,
    k_segment_ids: jax.Array,
    scale: float,
    angles: Angles | None = None,
    softcap: float | None = None,
    window: int | jax.Array | None = None,
    sinks: jax.Array | None = None,
    implementation: str = 'auto',
    self_attention: bool = True,
    causal: bool = True,
    packed: bool = True,
    kernels: KernelLog | None = None,
) -> jax.Array:
    """Attention with grouped queries within segments (Vaswani et al. 2017; Ainslie et al. 2023, arXiv:2305.13245).

    A query sees the keys of its own segment whose position is not after its own (if `causal`) and less than `window`
    before it. A query of segment 0 (padding), or without any such key, gets 0 and passes no gradient.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k: `[batch, keys, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
      v: like `k`.
      q_positions: `[batch, length]` int32.
      k_positions: `[batch, keys]` int32.
      q_segment_ids: `[batch, length]` int32.
      k_segment_ids: `[batch, keys]` int32.
      scale: factor on the scores, usually `head_dim ** -0.5`.
      angles: `(cos, sin)`, each `[batch, length, rotary_dim / 2]`, to turn queries and keys by, of which there are as
        many then; None = they are turned already, or not at all.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118); None = off.
      window: sliding window in tokens (a traced int32 scalar where it differs by layer); None = off.
      sinks: float32 `[heads]`, a score of each head that takes part in its softmax and adds nothing (gpt-oss), or None.
      implementation: `xla` (blocks, memory linear in length), `flash` (splash attention on TPU; cuDNN or our own
        Triton kernel on GPU) or `auto`: flash where it can run.
      self_attention: queries and keys are the same tokens in the same order, positions rising within a segment.
        False for a cache or another sequence.
      causal: False lets a query see later keys too.
      packed: False promises that every row is one segment, and padding after it.
      kernels: is told which implementation was chosen, or None.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `q`.

    Raises:
      UserError: `flash` was asked for and cannot run here; names `model.attention`.
    """
    batch, length, _, head_dim = q.shape
    chex.assert_shape(k, (batch, None, None, head_dim), custom_message='k')
    chex.assert_shape(v, k.shape, custom_message='v')
    for name, value, shape in (
        ('q_positions', q_positions, (batch, length)),
        ('k_positions', k_positions, k.shape[:2]),
        ('q_segment_ids', q_segment_ids, (batch, length)),
        ('k_segment_ids', k_segment_ids, k.shape[:2]),
    ):
        chex.assert_shape(value, shape, custom_message=name)
        chex.assert_type(value, int, custom_message=name)
    call = flash.Call(
        dtype=q.dtype,
        length=q.shape[1],
        keys=k.shape[1],
        head_dim=q.shape[3],
        softcap=softcap,
        window=window if window is None or isinstance(window, int) else 'traced',
        self_attention=self_attention,
        causal=causal,
        platform=platform(),
        sequence=axis_size('sequence'),
        sinks=sinks is not None,
        packed=packed,
    )
    name, reason = _choose(implementation, call)
    if kernels is not None:
        kernels.add(name, reason)

    traced = None if window is None or isinstance(window, int) else window
    mesh = _Division(q.shape, k.shape)
    pattern = Pattern(
        scale=float(scale),
        budget=_BUDGET.get(call.platform, _ACCELERATOR_BUDGET),
        softcap=softcap,
        window=window if isinstance(window, int) else None,
        causal=causal,
        aligned=self_attention and not mesh.length,
    )
    if name != 'xla':
        q, k, angles = rotate(q, angles), rotate(k, angles), None
    places = Places(q_positions, k_positions, q_segment_ids, k_segment_ids, angles, angles, traced)
    # The plain path has as much to do for every query of a divided row.
    zigzags = name in ('splash', 'triton') and zigzag.pays(q.shape[1], mesh.shards, pattern.window, causal)
    triton = functools.partial(_triton, zigzags=zigzags)
    functions = {'xla': blockwise, 'splash': flash.splash, 'triton': triton, 'cudnn': flash.cudnn}
    function: Callable[..., jax.Array] = functions[name]
    more = ()
    if name == 'splash':
        row_bytes = q.shape[3] * q.dtype.itemsize
        more = (flash.splash_kernel(mesh.own_heads, q.shape[1], mesh.shards, pattern, row_bytes, zigzags),)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, sinks: jax.Array | None, *more: Any) -> jax.Array:
        if not zigzags:
            return function(q, k, v, places, pattern, sinks, *more)
        q, ids = zigzag.spread(q, mesh.shards), zigzag.spread(places.q_segment_ids, mesh.shards)
        out = function(q, k, v, places._replace(q_segment_ids=ids), pattern, sinks, *more)
        return zigzag.restore(out, mesh.shards)

    return mesh.run(run, (q, k, v, places, sinks, *more))


def visible_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax of float32 scores `[..., keys]` over those that are visible (bool, broadcast); 0 where none is."""
    return jax.nn.softmax(jnp.where(visible, scores, MASK_VALUE), axis=-1) * visible


def _triton(
    q: jax.Array, k: jax.Array, v: jax.Array, places: Places, pattern: Pattern, sinks: jax.Array | None, zigzags: bool
) -> jax.Array:
    """`flash_triton.triton`, told where this device's queries are."""
    length, keys = q.shape[1], k.shape[1]
    starts: tuple[jax.Array | int, ...] = (0,)
    if length != keys:
        own = jax.lax.axis_index('sequence') * length
        starts = zigzag.starts(keys, keys // length) if zigzags else (own,)
    return flash_triton.triton(q, k, v, places, pattern, sinks, starts)


def _choose(implementation: str, call: flash.Call) -> tuple[str, str]:
    """The implementation, and why a faster kernel of this platform could not run, '' where none was wanted or is."""
    if implementation == 'xla':
        return 'xla', ''
    name, why_not = flash.available(call)
    if name:
        return name, why_not
    if implementation == 'flash':
        raise UserError(f'model.attention=flash: {why_not}; expected model.attention=auto or xla here')
    return 'xla', why_not if call.platform in flash.PLATFORMS and call.self_attention else ''


class _Division:
    """How the arrays lie on the mesh: rows over `data` and `fsdp`, queries over `sequence`, heads over `tensor`.

    Keys and values are gathered over `sequence`: every query must see all of them.
    """

    def __init__(self, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> None:
        self.axes = auto_axes()
        self.batch, self.length = dividing_axes(q_shape[0], BATCH_AXES), dividing_axes(q_shape[1], ('sequence',))
        self.heads = dividing_axes(q_shape[2], ('tensor',))
        # Fewer key heads than devices on `tensor`: each device needs the one that its query heads share.
        parts = axis_size(*self.heads)
        self.repeat = parts // math.gcd(k_shape[2], parts)
        if q_shape[2] % (k_shape[2] * self.repeat):
            self.heads, self.repeat = (), 1
        self.own_heads = q_shape[2] // axis_size(*self.heads)
        self.shards = axis_size(*self.length)

    def run(self, function: Callable[..., jax.Array], arrays: tuple) -> jax.Array:
        """`function` on each device's part of queries, keys, values, places, sinks and maybe a splash kernel."""
        if not self.axes:
            return function(*arrays)
        q, k, v, places, sinks, *more = arrays
        if self.repeat > 1:
            k, v = jnp.repeat(k, self.repeat, axis=2), jnp.repeat(v, self.repeat, axis=2)
        queries, keys = P(self.batch, self.length, self.heads, None), P(self.batch, None, self.heads, None)
        q_places, k_places = P(self.batch, self.length), P(self.batch, None)
        window = None if places.window is None else P()
        # Angles are divided as positions are.
        where = Places._make((q_places, k_places, q_places, k_places, q_places, k_places, window))
        mask = NamedSharding(jax.sharding.get_abstract_mesh(), P(None, self.length or None))
        blocks = [kernel.manual_sharding_spec(mask) for kernel in more]
        specs = (queries, keys, keys, where, P(self.heads or None), *blocks)
        divided = jax.shard_map(function, in_specs=specs, out_specs=queries, axis_names=set(self.axes), check_vma=False)
        return divided(q, k, v, places, sinks, *more)
