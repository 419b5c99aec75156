"""A model with its parameters as one value: what a step is given of a model that it asks and does not train."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.models.model import Head, Model
from jaxtune.weights import eval_mode


@functools.partial(jax.tree_util.register_dataclass, data_fields=['params'], meta_fields=['model'])
@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model and its parameters, a pytree of these.

    Attributes:
      model: without its parameters.
      params: arrays, or `jax.ShapeDtypeStruct`s.
    """

    model: Model
    params: Any

    def read(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Head]:
        """`(hidden [batch, length, d_model], head)` of a batch as `Model.apply` takes it; no gradient goes through."""
        params = jax.lax.stop_gradient(eval_mode(self.params))
        return jax.lax.stop_gradient((self.model.apply(params, batch).hidden, self.model.head(params)))
