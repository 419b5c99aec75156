"""Bottleneck adapters: small networks inside every layer train, all else is frozen.

`houlsby`: after the attention and the feed-forward layer (Houlsby et al. 2019, arXiv:1902.00751), in a decoder after
the attention to the source too; `pfeiffer`: after the feed-forward layer only (Pfeiffer et al. 2020, arXiv:2005.00247).
Their projection up begins at zero, so that training begins at the model itself.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights.tree import nested

MERGES = False
_STDDEV = 1e-2  # Houlsby et al., section 2.1


def init(params: Any, model: Model, config: ConfigDict, rng: jax.Array) -> Any:
    """The tree with adapters in every block that `method.layers` does not leave out."""
    leaves = leaf_paths(params)
    ending = '/mlp/down_proj/kernel'
    for path in [path for path in leaves if path.endswith(ending)]:
        block, (*stack, _, width) = path.removesuffix(ending), leaves[path].shape
        for name in _names(leaves, block, config.placement):
            key = jax.random.fold_in(rng, zlib.crc32(f'{block}/{name}'.encode()))
            down = _STDDEV * jax.random.truncated_normal(key, -2, 2, (*stack, width, config.bottleneck), jnp.float32)
            added = {
                'down/kernel': down,
                'down/bias': jnp.zeros((*stack, config.bottleneck), jnp.float32),
                'up/kernel': jnp.zeros((*stack, config.bottleneck, width), jnp.float32),
                'up/bias': jnp.zeros((*stack, width), jnp.float32),
            }
            leaves |= {f'{block}/{name}/{part}': leaf for part, leaf in added.items()}
    return nested(leaves)


def _names(leaves, block: str, placement: str) -> list[str]:
    names = ['mlp_adapter']
    if placement == 'houlsby':
        names.append('attention_adapter')
        if f'{block}/cross_attn/o_proj/kernel' in leaves:
            names.append('cross_adapter')
    return names


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: those of adapters."""
    return '_adapter/' in path
