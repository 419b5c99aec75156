"""What experts do to the tokens that chose them: two products, a gate between them, and sums of what tokens chose.

Accelerators multiply all rows at once, by a grouped product. A CPU works on a block of rows at a time, from their
tokens to the end, while what it computes lies in its cache; of a forward pass it keeps what the first products gave.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.dispatch import Dispatch, collect, spread, spread_weights
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.routing import Experts
from jaxtune.parallel import platform
from jaxtune.weights import dot, grouped_dot, is_weight

# The layers of all experts: name -> `kernel [experts, in, out]`, maybe `bias [experts, out]`.
Layers = dict[str, dict[str, Any]]
_LAST = 'down_proj'


def run_experts(
    tokens: jax.Array,
    weights: jax.Array,
    layers: Layers,
    plan: Dispatch,
    experts: Experts,
    activation: str,
    rng: jax.Array | None = None,
) -> jax.Array:
    """`[tokens, d_model]`: for each token the sum of what its experts give, weighed.

    Args:
      tokens: `[tokens, d_model]`.
      weights: float32 `[tokens, top_k]`.
      layers: of the experts.
      plan: where the tokens go.
      experts: how a gate works.
      activation: of the gate.
      rng: key for dropout in typed leaves, or None.
    """
    gate = functools.partial(_gated, experts=experts, activation=activation)
    if platform() == 'cpu':
        return _by_blocks(gate, plan.groups.block, tokens, weights, layers, plan, rng)

    # What the first products give is kept for the backward pass; rows and gates are cheaper to make again.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names('product'))
    def all_rows(tokens: jax.Array, weights: jax.Array, layers: Layers) -> jax.Array:
        def linear(name: str, rows: jax.Array, shares: jax.Array | None = None) -> jax.Array:
            key = None if rng is None else jax.random.fold_in(rng, list(layers).index(name))
            y = grouped_dot(rows, layers[name]['kernel'], plan.groups, key)
            if 'bias' in layers[name]:
                bias = jnp.take(layers[name]['bias'], plan.groups.of_rows(), axis=0)
                y = y + (bias if shares is None else bias * shares).astype(y.dtype)
            return y

        rows = spread(tokens, plan.pairs, plan.slots)
        first = {name: checkpoint_name(linear(name, rows), 'product') for name in layers if name != _LAST}
        # Weighed before the last product, whose output the gradient of the weights would need otherwise.
        shares = spread_weights(weights, plan.pairs, plan.slots)[:, None]
        return collect(linear(_LAST, _weighed(gate(first), shares), shares), plan.pairs, plan.slots)

    return all_rows(tokens, weights, layers)


def _weighed(hidden: jax.Array, shares: jax.Array) -> jax.Array:
    return (hidden * shares).astype(hidden.dtype)


def _gated(first: dict[str, jax.Array], *, experts: Experts, activation: str) -> jax.Array:
    """What the last layer of each row's expert reads, of what the first ones gave."""
    if experts.fused == 'interleaved':
        gate, up = first['gate_up_proj'][:, ::2], first['gate_up_proj'][:, 1::2]
    elif experts.fused:
        gate, up = jnp.split(first['gate_up_proj'], 2, axis=-1)
    else:
        gate, up = first['gate_proj'], first['up_proj']
    if experts.clamp is None:
        return ACTIVATIONS[activation](gate) * up
    alpha, limit = experts.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _ready(layers: Layers) -> Layers:
    """Layers of which each expert's part can be taken, wide where they are quantised."""
    return jax.tree.map(lambda leaf: leaf.by_group() if is_weight(leaf) else leaf, layers, is_leaf=is_weight)


def _of(layers: Layers, number: jax.Array) -> Layers:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, keepdims=False), layers)


def _first(layers: Layers, rows: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
    """What the first layers of one expert give."""
    return {name: _linear(layer, rows, key, i) for i, (name, layer) in enumerate(layers.items())}


def _last(
    gate: Any, layer: dict[str, Any], first: dict[str, jax.Array], shares: jax.Array, key: jax.Array | None
) -> jax.Array:
    """What one expert gives for `[rows, 1]` shares in sums."""
    y = _linear({'kernel': layer['kernel']}, _weighed(gate(first), shares), key, len(first))
    return y + (layer['bias'] * shares).astype(y.dtype) if 'bias' in layer else y


def _linear(layer: dict[str, Any], rows: jax.Array, key: jax.Array | None, number: int) -> jax.Array:
    y = dot(rows, layer['kernel'], None if key is None else jax.random.fold_in(key, number))
    return y + layer['bias'].astype(y.dtype) if 'bias' in layer else y


class _Blocks:
    """Rows in blocks of one expert each, and what belongs to them."""

    def __init__(
        self, block: int, plan: Dispatch, tokens: jax.Array, weights: jax.Array, rng: jax.Array | None
    ) -> None:
        self.block, self.plan, self.tokens, self.rng = block, plan, tokens, rng
        self.weights, self.top_k = weights.reshape(-1), weights.shape[1]
        self.rows = plan.groups.rows
        self.of = plan.groups.of_rows()[::block]
        self.used = plan.groups.sizes.sum() // block

    def part(self, array: jax.Array, i: jax.Array) -> jax.Array:
        """The block's rows of an array of all rows."""
        return lax.dynamic_slice_in_dim(array, i * self.block, self.block)

    def pairs(self, i: jax.Array) -> jax.Array:
        return self.part(self.plan.pairs, i)

    def gather(self, array: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.take(array, at, axis=0, mode='fill', fill_value=0)

    def begin(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Rows, shares and key of a block."""
        pairs = self.pairs(i)
        key = None if self.rng is None else jax.random.fold_in(self.rng, i)
        return self.gather(self.tokens, pairs // self.top_k), self.gather(self.weights, pairs)[:, None], key

    def put(self, array: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), i * self.block, 0)

    def empty(self, like: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros((self.rows, *leaf.shape[1:]), leaf.dtype), like)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_blocks(
    gate: Any, block: int, tokens: jax.Array, weights: jax.Array, layers: Layers, plan: Dispatch, rng: Any
) -> jax.Array:
    """What `run_experts` gives."""
    return _blocks_forward(gate, block, tokens, weights, layers, plan, rng)[0]


def _split(layers: Layers) -> tuple[Layers, dict[str, Any]]:
    return {name: layer for name, layer in layers.items() if name != _LAST}, layers[_LAST]


def _blocks_forward(
    gate: Any, block: int, tokens: jax.Array, weights: jax.Array, layers: Layers, plan: Dispatch, rng: Any
) -> tuple[jax.Array, tuple]:
    blocks = _Blocks(block, plan, tokens, weights, rng)
    early, late = _split(_ready(layers))

    def run(i: jax.Array) -> tuple[jax.Array, Any]:
        rows, shares, key = blocks.begin(i)
        first = _first(_of(early, blocks.of[i]), rows, key)
        return _last(gate, _of(late, blocks.of[i]), first, shares, key), first

    def step(i: jax.Array, done: Any) -> Any:
        return jax.tree.map(lambda array, part: blocks.put(array, part, i), done, run(i))

    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.int32))
    y, first = lax.fori_loop(0, blocks.used, step, blocks.empty(shapes))
    first = checkpoint_name(first, 'product')
    return collect(y, plan.pairs, plan.slots), (tokens, weights, layers, plan, rng, first)


def _blocks_backward(gate: Any, block: int, residuals: tuple, d_y: jax.Array) -> tuple:
    tokens, weights, layers, plan, rng, first = residuals
    blocks = _Blocks(block, plan, tokens, weights, rng)
    ready, pull_ready = jax.vjp(_ready, layers)  # not kept: wide, they are several times as large
    early, late = _split(ready)

    def step(i: jax.Array, done: Any) -> Any:
        (d_rows, d_shares), sums = done
        rows, shares, key = blocks.begin(i)
        of, kept = blocks.of[i], jax.tree.map(lambda array: blocks.part(array, i), first)
        # What the products gave is not made again: nothing reads it.
        last = lambda layer, kept, shares: _last(gate, layer, kept, shares, key)  # noqa: E731
        _, pull = jax.vjp(last, _of(late, of), kept, shares)
        d_late, d_first, d_share = pull(blocks.gather(d_y, blocks.pairs(i) // blocks.top_k))
        _, pull = jax.vjp(lambda layers, rows: _first(layers, rows, key), _of(early, of), rows)
        d_early, d_row = pull(d_first)
        sums = jax.tree.map(lambda total, part: _added(total, part, of), sums, (d_early, d_late))
        return (blocks.put(d_rows, d_row, i), blocks.put(d_shares, d_share[:, 0], i)), sums

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (early, late))
    begun = ((jnp.zeros((blocks.rows, tokens.shape[1]), tokens.dtype), jnp.zeros(blocks.rows, jnp.float32)), zeros)
    (d_rows, d_shares), (d_early, d_late) = lax.fori_loop(0, blocks.used, step, begun)
    d_layers = {name: d_late if name == _LAST else d_early[name] for name in layers}
    (d_layers,) = pull_ready(jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), d_layers, ready))
    d_weights = blocks.gather(d_shares, plan.slots)
    return collect(d_rows, plan.pairs, plan.slots), d_weights, d_layers, None, None


def _added(total: jax.Array, part: jax.Array, of: jax.Array) -> jax.Array:
    own = lax.dynamic_index_in_dim(total, of, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, own + part.astype(total.dtype), of, 0)


_by_blocks.defvjp(_blocks_forward, _blocks_backward)
