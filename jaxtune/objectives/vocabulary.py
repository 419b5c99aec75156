"""How the loss over a vocabulary is divided: into chunks of tokens, and over the devices of a mesh."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxtune.parallel import BATCH_AXES, axis_size, dividing_axes, one_cpu

# Elements of one chunk's float32 logits (32 MiB), and the fewest tokens for which the kernel's gradient, read and
# written once a chunk, costs little beside the products.
_CHUNK_ELEMENTS = 2**23
_CHUNK_TOKENS = 512

_PAGE = 1024  # float32 numbers in 4 KiB
_PADDING = 16  # and in a cache line


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when the loss is traced.

    Attributes:
      chunk: tokens at a time of one device.
      vocab_major: the kernel is `[vocab, d_model]`.
      scale: of the logits.
      softcap: of the logits, or None.
      batch_axes: axes of the mesh that divide rows.
      length_axes: those that divide a row's tokens.
      vocab_axes: those that divide the vocabulary.
      scatter_axes: those over which the kernel's gradient is scattered along `d_model`.
      gather_axes: those over which a chunk's tokens are gathered, for each device has another part of the vocabulary.
      across: logits are computed from a copy of the kernel `[d_model, vocab]`.
      padding: tokens that this copy has more.
      ids: of new rows.
    """

    chunk: int
    vocab_major: bool
    scale: float
    softcap: float | None
    batch_axes: tuple[str, ...] = ()
    length_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    scatter_axes: tuple[str, ...] = ()
    gather_axes: tuple[str, ...] = ()
    across: bool = False
    padding: int = 0
    ids: tuple[int, ...] = ()

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes of the mesh that divide tokens."""
        return self.batch_axes + self.length_axes

    @property
    def kernel_spec(self) -> P:
        """How the kernel lies on the mesh."""
        return P(self.vocab_axes, None) if self.vocab_major else P(None, self.vocab_axes)

    @property
    def gradient_spec(self) -> P:
        """How its gradient does."""
        vocab, width = self.vocab_axes, self.scatter_axes
        return P(vocab, width) if self.vocab_major else P(width, vocab)


def vocab_of(layout: Any, kernel: jax.Array) -> int:
    """Tokens of a kernel, laid out as a head or a plan says."""
    return kernel.shape[0 if layout.vocab_major else 1]


def make_plan(hidden: jax.Array, head: Any, kernel: jax.Array, chunk: int | None) -> Plan:
    """How the loss of `hidden` `[batch, length, d_model]` is divided on the mesh that is set; see `cross_entropy`."""
    vocab = vocab_of(head, kernel)
    scale = 1.0 if head.scale is None else float(head.scale)
    softcap = None if not head.softcap else float(head.softcap)
    batch, length, width = hidden.shape
    batch_axes, length_axes = dividing_axes(batch, BATCH_AXES), dividing_axes(length, ('sequence',))
    vocab_axes, gather_axes = dividing_axes(vocab, ('tensor',)), ()
    scatter_axes = dividing_axes(width, ('fsdp',)) if 'fsdp' in batch_axes else ()
    parts = axis_size(*vocab_axes)
    if scatter_axes:
        shards = axis_size(*batch_axes, *length_axes) // axis_size('fsdp')
        both = dividing_axes(vocab, ('tensor', 'fsdp'))
        # The tokens there and back are then at most twice the kernel and its gradient, which is not read and written
        # whole once a chunk.
        if both and batch * length // shards <= 2 * vocab:
            vocab_axes, gather_axes, scatter_axes = both, ('fsdp',), ()
    if chunk is None:
        chunk = max(_CHUNK_TOKENS, _CHUNK_ELEMENTS * parts // vocab)
    axes = (batch_axes, length_axes, vocab_axes, scatter_axes, gather_axes)
    across, padding = False, 0
    if one_cpu():
        across = bool(head.vocab_major)
        padding = _PADDING if vocab % _PAGE == 0 and softcap is None else 0
        chunk = max(1, chunk * vocab // (vocab + padding))  # the padding is no extra memory
    ids = () if getattr(head, 'rows', None) is None else head.ids
    return Plan(chunk, bool(head.vocab_major), scale, softcap, *axes, across, padding, ids)


def per_device(plan: Plan, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Runs a function on each device's tokens and vocabulary, the mesh axes in the plan being manual."""
    axes = {*plan.token_axes, *plan.vocab_axes}
    if not axes:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def specs_of(plan: Plan, bias: jax.Array | None) -> tuple[P, P, P | None, P]:
    """Specs of hidden, kernel, bias and of what has one value a token."""
    tokens = P(plan.batch_axes, plan.length_axes)
    return P(*tokens, None), plan.kernel_spec, None if bias is None else P(plan.vocab_axes), tokens


def chunks(plan: Plan, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`[batch, length, ...]` as `[chunks, tokens, ...]`, filled up with zeros."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    count = max(1, math.ceil(tokens / plan.chunk))
    size = math.ceil(tokens / count)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(tokens, *x.shape[2:])
        if count * size != tokens:
            x = jnp.pad(x, ((0, count * size - tokens),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    return tuple(cut(x) for x in arrays)


def uncut(x: jax.Array, batch: int, length: int) -> jax.Array:
    """Undoes `chunks`."""
    x = x.reshape(-1, *x.shape[2:])
    return x[: batch * length].reshape(batch, length, *x.shape[1:])


def gathered(plan: Plan, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """A chunk's arrays `[tokens, ...]` with those of the devices that have other parts of the vocabulary."""
    if not plan.gather_axes:
        return arrays
    return tuple(lax.all_gather(x, plan.gather_axes, tiled=True) for x in arrays)


def own(plan: Plan, x: jax.Array) -> jax.Array:
    """Of an array of all `gathered` tokens, that of this device's."""
    if not plan.gather_axes:
        return x
    count = len(x) // lax.axis_size(plan.gather_axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(plan.gather_axes) * count, count)


def scattered(plan: Plan, x: jax.Array) -> jax.Array:
    """Sums of what devices have for all `gathered` tokens, each device's own."""
    if not plan.gather_axes:
        return x
    return lax.psum_scatter(x, plan.gather_axes, tiled=True)
