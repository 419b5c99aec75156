"""Fused attention kernels: splash attention on TPU (Pallas), cuDNN's on GPU.

FlashAttention: Dao 2023, arXiv:2307.08691.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.blockwise import Pattern, Places

PLATFORMS = ('tpu', 'gpu')  # those that have a fused kernel
_BLOCKS = (512, 256, 128)  # of queries and keys a splash kernel works on; a length must be a multiple of one


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


def available(call: Call) -> tuple[str, str]:
    """`(name, '')` of the kernel that can run a call, or `('', why none can)`."""
    if call.platform not in PLATFORMS:
        return '', f'there is no fused attention kernel for {call.platform}'
    if not call.self_attention or call.length != call.keys:
        return '', 'the fused kernels attend within one sequence, not to a cache or to another sequence'
    if call.window == 'traced':
        return '', 'the fused kernels need the same sliding window in every layer'
    return _splash_runs(call) if call.platform == 'tpu' else _cudnn_runs(call)


def _splash_runs(call: Call) -> tuple[str, str]:
    if call.length % (call.sequence * _BLOCKS[-1]):
        parts = f' x mesh.sequence={call.sequence}' if call.sequence > 1 else ''
        return '', f'the TPU kernel needs a multiple of {_BLOCKS[-1]}{parts} tokens, and data.seq_len={call.length}'
    if call.window is not None and not call.causal:
        return '', 'a sliding window is implemented for causal attention'
    return 'splash', ''


def _cudnn_runs(call: Call) -> tuple[str, str]:
    if call.sequence > 1:
        return '', f'cuDNN attention does not divide the length, and mesh.sequence={call.sequence}'
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return '', f'cuDNN attention runs in bfloat16, and model.compute_dtype={jnp.dtype(call.dtype).name}'
    if call.softcap is not None:
        return '', 'cuDNN attention has no soft cap on the scores'
    if call.sinks:
        return '', 'cuDNN attention has no attention sinks'
    if call.head_dim > 128 or call.head_dim % 8:
        return '', f'cuDNN attention needs a head_dim of at most 128 and a multiple of 8, not {call.head_dim}'
    if call.length % 2:
        return '', f'cuDNN attention needs an even length, and data.seq_len={call.length}'
    if call.window is not None and not call.causal:
        return '', 'a sliding window is implemented for causal attention'
    return 'cudnn', ''


def _named(*arrays: jax.Array) -> list[jax.Array]:
    return [checkpoint_name(x, f'attention_{name}') for x, name in zip(arrays, 'qkv', strict=True)]


def _without_padding(out: jax.Array, places: Places) -> jax.Array:
    """Padding sees padding inside the kernels; its rows are 0, so that it passes no gradient either."""
    return jnp.where((places.q_segment_ids > 0)[:, :, None, None], out, 0)


def splash_kernel(heads: int, length: int, shards: int, pattern: Pattern, interpret: bool = False) -> Any:
    """Splash attention's kernel: a pytree with the blocks of the mask, of which each device needs its queries' part.

    Made anew in every trace: a scan's are traced more than once, and its arrays belong to the one they are made in.
    What takes time, its blocks of the mask, the library remembers.

    Args:
      heads: of one device.
      length: tokens of a row.
      shards: devices that a row's queries are divided over.
      pattern: who sees whom.
      interpret: runs in Pallas' interpreter.
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
    size = next(size for size in _BLOCKS if length // shards % size == 0)
    blocks = kernels.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
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

    Segments are a mask `[batch, 1, length, length]` in the compute dtype: one byte pair a pair of tokens, shared by
    the heads.
    """
    q, k, v = _named(q, k, v)
    same = places.q_segment_ids[:, None, :, None] == places.k_segment_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same,
        scale=pattern.scale,
        is_causal=pattern.causal,
        local_window_size=None if pattern.window is None else (pattern.window - 1, 0),
        implementation='cudnn',
    )
    return _without_padding(checkpoint_name(out, 'attention_out'), places)
