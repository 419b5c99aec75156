"""The value head of reinforcement learning: what reward a policy's next tokens will bring, read off its hidden states.

It is one more entry of the parameter tree, beside the language model that it shares.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.models.model import Model

NAME = 'value'
PATHS = frozenset({f'{NAME}/kernel', f'{NAME}/bias'})


def with_value(params: dict[str, Any], model: Model) -> dict[str, Any]:
    """The tree with a value head that says 0 of everything."""
    head = {'kernel': jnp.zeros((model.config.d_model, 1), model.param_dtype)}
    return params | {NAME: head | {'bias': jnp.zeros(1, jnp.float32)}}


def policy(params: dict[str, Any]) -> dict[str, Any]:
    """The tree without its value head: the language model."""
    return {name: leaf for name, leaf in params.items() if name != NAME}


def values(params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """Values `[batch, length]` float32 of hidden states `[batch, length, d_model]`."""
    head = params[NAME]
    # A sum of products, not a matrix product: those round their inputs on some accelerators.
    products = hidden.astype(jnp.float32) * head['kernel'][:, 0].astype(jnp.float32)
    return products.sum(-1) + head['bias'][0].astype(jnp.float32)
