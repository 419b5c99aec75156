"""Fused attention kernels: splash attention on TPU (Pallas), and on GPU our own (`flash_triton`) or cuDNN's.

FlashAttention: Dao 2023, arXiv:2307.08691.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models import zigzag
from jaxtune.models.blockwise import Pattern, Places
from jaxtune.models.flash_triton import LARGEST_HEAD
from jaxtune.models.splash_blocks import SMALLEST, Blocks, choose
from jaxtune.parallel import compute_capability

PLATFORMS = ('tpu', 'gpu')  # those that have a fused kernel


@dataclasses.dataclass(frozen=True)
class Call:
    """What decides whether a kernel can run.

    Attributes:
      dtype: of the queries.
      length: queries; `keys`: keys; `head_dim`: width of a head.
      softcap: None without.
      window: None, a number of tokens, or `traced`.
      self_attention: queries and keys are the same tokens.
      causal: keys after the query are hidden.
      platform: `cpu`, `gpu` or `tpu`.
      sequence: devices that the length is divided over.
      sinks: each head has a score that takes part in its softmax.
      packed: a row may hold several segments.
    """

    dtype: jnp.dtype
    length: int
    keys: int
    head_dim: int
    softcap: float | None
    window: int | str | None
    self_attention: bool
    causal: bool
    platform: str
    sequence: int
    sinks: bool = False
    packed: bool = True


def available(call: Call) -> tuple[str, str]:
    """The kernel that can run a call, and why a faster one cannot; `('', why none can)` where there is none."""
    if call.platform not in PLATFORMS:
        return '', f'there is no fused attention kernel for {call.platform}'
    if not call.self_attention or call.length != call.keys:
        return '', 'the fused kernels attend within one sequence, not to a cache or to another sequence'
    return _splash_runs(call) if call.platform == 'tpu' else _gpu_runs(call)


def _splash_runs(call: Call) -> tuple[str, str]:
    if call.window == 'traced':
        return '', 'the TPU kernel needs the same sliding window in every layer'
    if call.length % (call.sequence * SMALLEST):
        parts = f' x mesh.sequence={call.sequence}' if call.sequence > 1 else ''
        return '', f'the TPU kernel needs a multiple of {SMALLEST}{parts} tokens, and data.seq_len={call.length}'
    if call.window is not None and not call.causal:
        return '', 'a sliding window is implemented for causal attention'
    return 'splash', ''


def _gpu_runs(call: Call) -> tuple[str, str]:
    why_not_cudnn = _why_not_cudnn(call)
    if not why_not_cudnn:
        return 'cudnn', ''
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        kind = jnp.dtype(call.dtype).name
        return '', f'the GPU kernels run in bfloat16 and float16, and model.compute_dtype={kind}'
    if call.head_dim > LARGEST_HEAD:
        return '', f'the GPU kernels need a head_dim of at most {LARGEST_HEAD}, not {call.head_dim}'
    capability = compute_capability()
    if capability < (8, 0):
        return '', f'Triton needs compute capability 8.0, and this GPU has {".".join(map(str, capability))}'
    return 'triton', why_not_cudnn


def _why_not_cudnn(call: Call) -> str:
    """Why cuDNN's attention, which skips only what its own causal mask or window hides, cannot run; '' if it can."""
    if call.packed:
        return 'rows are packed, for which cuDNN would read a mask of length x length'
    if call.sequence > 1:
        return f'cuDNN does not divide the length, and mesh.sequence={call.sequence}'
    if call.window == 'traced':
        return 'cuDNN needs the same sliding window in every layer'
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return 'cuDNN runs in bfloat16'
    if call.softcap is not None:
        return 'cuDNN has no soft cap on the scores'
    if call.sinks:
        return 'cuDNN has no attention sinks'
    if call.head_dim > 128 or call.head_dim % 8:
        return f'cuDNN needs a head_dim of at most 128 and a multiple of 8, not {call.head_dim}'
    if call.length % 2:
        return f'cuDNN needs an even length, and data.seq_len={call.length}'
    if call.window is not None and not call.causal:
        return 'cuDNN has a sliding window for causal attention alone'
    return ''


def _named(*arrays: jax.Array) -> list[jax.Array]:
    return [checkpoint_name(x, f'attention_{name}') for x, name in zip(arrays, 'qkv', strict=True)]


def _without_padding(out: jax.Array, places: Places) -> jax.Array:
    """Padding sees padding inside the kernels; its rows are 0, so that it passes no gradient either."""
    return jnp.where((places.q_segment_ids > 0)[:, :, None, None], out, 0)


def splash_kernel(
    heads: int,
    length: int,
    shards: int,
    pattern: Pattern,
    row_bytes: int = 256,
    zigzags: bool = False,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Any:
    """Splash attention's kernel: a pytree with the blocks of the mask, of which each device needs its queries' part.

    Made anew in every trace: a scan's are traced more than once, and its arrays belong to the one they are made in.
    What takes time, its blocks of the mask, the library remembers.

    Args:
      heads: of one device.
      length: tokens of a row.
      shards: devices that a row's queries are divided over.
      pattern: who sees whom.
      row_bytes: of one query.
      zigzags: each device's queries are those of two chunks, as `zigzag` divides them.
      interpret: runs in Pallas' interpreter.
      blocks: sizes of blocks; None = those that take least time.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # slow to import
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks  # slow to import

    shape = (length, length)
    if not pattern.causal:
        mask = masks.FullMask(shape)
    elif pattern.window is None:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (pattern.window - 1, 0), 0)
    if zigzags and isinstance(mask, (masks.CausalMask, masks.LocalMask)):
        mask.q_sequence = zigzag.positions(length, shards)  # which its blocks, equality and hash go by
    parts = 2 * shards if zigzags else shards
    blocks = blocks or choose(length, parts, row_bytes, pattern.window, pattern.causal)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**blocks.sizes),
        attn_logits_soft_cap=pattern.softcap,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name='attention_out',
        interpret=interpret,
    )


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: Places,
    pattern: Pattern,
    sinks: jax.Array | None,
    kernel: Any,
) -> jax.Array:
    """Splash attention on one TPU's rows, queries and heads; shapes as in `blockwise`; `kernel` by `splash_kernel`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # slow to import

    q = q * jnp.asarray(pattern.scale, q.dtype)
    q, k, v = _named(*(x.swapaxes(1, 2) for x in (q, k, v)))
    segment_ids = kernels.SegmentIds(places.q_segment_ids, places.k_segment_ids)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q, k, v, segment_ids, sinks).swapaxes(1, 2)
    return _without_padding(out.astype(q.dtype), places)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, places: Places, pattern: Pattern, sinks: None = None) -> jax.Array:
    """CuDNN's attention on one GPU's rows and heads; shapes as in `blockwise`.

    Rows are one segment each, and then padding, which comes after all that a causal mask lets see. A row that is not
    would be wrong, and gets NaN.
    """
    q, k, v = _named(q, k, v)
    ids = places.q_segment_ids
    lengths = None if pattern.causal else (ids > 0).sum(-1, dtype=jnp.int32)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=pattern.scale,
        is_causal=pattern.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if pattern.window is None else (pattern.window - 1, 0),
        implementation='cudnn',
    )
    whole = ((ids[:, 1:] == ids[:, :-1]) | (ids[:, 1:] == 0)).all(-1)
    out = jnp.where(whole[:, None, None, None], out, jnp.nan)
    return _without_padding(checkpoint_name(out, 'attention_out'), places)
