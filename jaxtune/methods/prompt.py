"""Prompt tuning: tokens before the text train, all else is frozen.

As embeddings (Lester et al. 2021, arXiv:2104.08691), or with `method.prefix` as keys and values in every layer (Li and
Liang 2021, arXiv:2101.00190). They begin as a text (`method.init_text`), or as tokens drawn from the vocabulary.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights import lookup
from jaxtune.weights.tree import nested

MERGES = False
_STDDEV = 2e-2


def init(params: Any, model: Model, config: ConfigDict, rng: jax.Array) -> Any:
    """The tree with tokens before the text; `config.init_ids`, where given, are repeated to fill them."""
    count = config.virtual_tokens
    ids = config.get('init_ids', ())
    if ids:
        chosen = jnp.resize(jnp.asarray(ids, jnp.int32), (count,))
    else:
        chosen = jax.random.randint(rng, (count,), 0, model.config.vocab_size)
    if config.prefix:
        return _with_prefix(params, model, chosen, rng)
    leaves = leaf_paths(params)
    table = leaves['shared/embedding' if model.kind == 'encdec' else 'embed_tokens/embedding']
    return nested(leaves | {'prompt/embedding': lookup(table, chosen, jnp.float32)})


def _with_prefix(params: Any, model: Model, tokens: jax.Array, rng: jax.Array) -> Any:
    """The tree with a prefix in every attention layer: a decoder's own keys and values of the tokens.

    Where every token sees those after it, none has keys and values without the text: those begin small and random.
    """
    leaves, (count,) = leaf_paths(params), tokens.shape
    c = model.config
    heads = (count, getattr(c, 'num_kv_heads', c.num_heads), c.head_dim)
    if model.kind == 'decoder':
        read = model.apply(params, {'tokens': tokens[None]}, cache=model.init_cache(1, count)).cache
        added = {f'layers/self_attn/prefix/{name}': read[name][:, 0].swapaxes(1, 2) for name in ('k', 'v')}
        return nested(leaves | {path: leaf.astype(jnp.float32) for path, leaf in added.items()})
    for path in [path for path in leaves if path.endswith('_attn/o_proj/kernel')]:
        layer, stack = path.removesuffix('/o_proj/kernel'), leaves[path].shape[:-2]
        for name in ('k', 'v'):
            key = jax.random.fold_in(rng, zlib.crc32(f'{layer}/{name}'.encode()))
            leaves[f'{layer}/prefix/{name}'] = _STDDEV * jax.random.normal(key, (*stack, *heads), jnp.float32)
    return nested(leaves)


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: the prompt, or the prefixes."""
    return path.startswith('prompt/') or '/prefix/' in path
