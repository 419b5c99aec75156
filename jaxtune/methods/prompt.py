"""Prompt tuning: embedded tokens before the text train, all else is frozen (Lester et al. 2021, arXiv:2104.08691).

They begin as the embeddings of a text (`method.init_text`), or of tokens drawn from the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights import lookup
from jaxtune.weights.tree import nested

MERGES = False


def init(params: Any, model: Model, config: ConfigDict, rng: jax.Array) -> Any:
    """The tree with a prompt of `method.virtual_tokens`; `config.init_ids`, where given, are repeated to fill it."""
    count = config.virtual_tokens
    ids = config.get('init_ids', ())
    if ids:
        chosen = jnp.resize(jnp.asarray(ids, jnp.int32), (count,))
    else:
        chosen = jax.random.randint(rng, (count,), 0, model.config.vocab_size)
    leaves = leaf_paths(params)
    table = leaves['shared/embedding' if model.kind == 'encdec' else 'embed_tokens/embedding']
    return nested(leaves | {'prompt/embedding': lookup(table, chosen, jnp.float32)})


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: the prompt."""
    return path.startswith('prompt/')
