"""Multi-head latent attention: keys and values out of one narrow vector a token (DeepSeek-V2, arXiv:2405.04434)."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxtune.models.layers import RMSNorm
from jaxtune.parallel import constrain

if TYPE_CHECKING:
    from jaxtune.models.decoder import Attention

_EPSILON = 1e-6  # of the norms of the narrow vectors, whatever the config says


def project_latent(attention: 'Attention', x: jax.Array) -> list[jax.Array]:
    """Queries, keys and values `[batch, length, heads, head_dim]` of `x` `[batch, length, d_model]`.

    The dimensions that turn come first, in queries and keys alike, which leaves scores as they are; values are filled
    up with zeros to the width of keys.
    """
    c, latent = attention.config, attention.config.latent
    assert latent is not None  # the caller looked
    heads, still = c.num_heads, c.head_dim - latent.rotary_dim
    if latent.q_rank is None:
        q = attention.dense('q_proj', heads * c.head_dim, False)(x)
    else:
        narrow = attention.dense('q_a_proj', latent.q_rank, c.qkv_bias)(x)
        narrow = RMSNorm(_EPSILON, name='q_a_layernorm')(narrow)
        q = attention.dense('q_b_proj', heads * c.head_dim, False)(narrow)
    narrow = attention.dense('kv_a_proj_with_mqa', latent.kv_rank + latent.rotary_dim, c.qkv_bias)(x)
    narrow, k_turned = jnp.split(narrow, (latent.kv_rank,), axis=-1)
    narrow = RMSNorm(_EPSILON, name='kv_a_layernorm')(narrow)
    kv = attention.dense('kv_b_proj', heads * (still + latent.value_dim), False)(narrow)

    q_still, q_turned = jnp.split(q.reshape(*x.shape[:2], heads, -1), (still,), axis=-1)
    k_still, v = jnp.split(kv.reshape(*x.shape[:2], heads, -1), (still,), axis=-1)
    k_turned = k_turned[:, :, None]
    q = jnp.concatenate([q_turned, q_still], axis=-1)
    k = jnp.concatenate([jnp.broadcast_to(k_turned, (*k_still.shape[:-1], k_turned.shape[-1])), k_still], axis=-1)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, c.head_dim - latent.value_dim)))
    return [constrain(y, 'batch', 'length', 'heads', None) for y in (q, k, v)]
