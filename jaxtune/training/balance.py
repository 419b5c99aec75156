"""Keeping experts evenly used: what is added to a loss for it, what moves without one, and what the log tells."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxtune.models import Model, Outputs
from jaxtune.models.routing import Routing, balance, balance_loss, moved_correction, z_loss

_ROUTING = 'routing'
_CORRECTION = ('layers', 'mlp', 'router', 'correction')


class _Learning(Protocol):
    def loss(self, model: Model, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Any:
        """The summed loss of a batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Balance:
    """How experts are kept evenly used.

    Attributes:
      aux_loss: weight of the auxiliary loss of all layers together; each micro-batch has its own, as in
        `transformers`.
      z_loss: weight of the z-loss of the router's logits.
      bias_rate: how far an update moves the bias that a router only chooses by.
    """

    aux_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0

    def loss(
        self, learning: _Learning, model: Model, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None
    ) -> Any:
        """The summed loss of a batch in training, with what is added to it, and sums about the routing."""
        routings: list[Routing] = []

        def forward(*args: Any, **settings: Any) -> Outputs:
            outputs = model.forward(*args, **settings)
            routings.extend([] if outputs.routing is None else [outputs.routing])
            return outputs

        total, count, sums = learning.loss(dataclasses.replace(model, forward=forward), params, batch, rng)
        if not routings:
            return total, count, sums
        routing = jax.tree.map(lambda *parts: sum(parts), *routings)
        if self.aux_loss:
            total = total + count * self.aux_loss * balance_loss(routing)
        if self.z_loss:
            total = total + count * self.z_loss * z_loss(routing)
        return total, count, {**sums, _ROUTING: jax.lax.stop_gradient(routing)}

    def settle(self, trainable: Any, sums: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(trainable, sums)` after an update: the bias moved, and what the log tells of the whole batch's routing."""
        if _ROUTING not in sums:
            return trainable, sums
        routing = sums[_ROUTING]
        told = balance(routing.counts) | {'router_aux_loss': balance_loss(routing), 'router_z_loss': z_loss(routing)}
        one = jnp.ones((), jnp.float32)
        sums = {name: value for name, value in sums.items() if name != _ROUTING}
        sums |= {name: (value, one) for name, value in told.items()}
        if self.bias_rate:
            move = functools.partial(moved_correction, counts=routing.counts, rate=self.bias_rate)
            trainable = _replaced(trainable, _CORRECTION, move)
        return trainable, sums


def _replaced(tree: Any, path: tuple[str, ...], change: Any) -> Any:
    """A tree with the leaf at a path changed, where there is one."""
    if not path:
        return tree if tree is None else change(tree)
    if not isinstance(tree, dict) or path[0] not in tree:
        return tree
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], change)}
