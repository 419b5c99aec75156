"""Updates of parameters whose optimizer state lies in the host's memory: one layer's of it is on the device at a time.

Large stacks of layers are updated in a loop, which gets a layer's moments from the host, and sends them back. Only a
loop keeps XLA from getting all of them before the backward pass: it removes `optimization_barrier` before it orders
instructions, and moves single copies to where they hide best. What is no large stack, such as embeddings, comes and
goes whole, and may come early. The rules of `optimizers` treat a parameter, and a layer of a stack, by themselves, so
the numbers are those of one update of everything.

libtpu fails over copies of whole arrays of eight bits (they lie in tiles of 8 x 128 in the host's memory, of 32 x 128
in the device's), and not over parts that are whole rows: they are cut, and what cannot be stays on the device. So do
the scales of eight-bit moments, a sixtieth of them, whose copies it lays out in a way that it refuses afterwards.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from jaxtune.optim.adam8bit import LARGE
from jaxtune.optim.stochastic_rounding import apply_updates
from jaxtune.parallel.rules import path_name
from jaxtune.weights.tree import layer_dims, nested

_HOST = 'pinned_host'
_PARTS = 8  # that eight-bit moments which are no stack come and go in
_ROWS = 32  # of a tile of eight-bit numbers
_SMALL = 2**20  # elements; eight-bit moments with fewer stay on the device

_Leaves = dict[str, jax.Array]


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by path `a/b/c`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def on_host(shapes: Any, placed: Any) -> Any:
    """Shardings of a state that lies in the host's memory.

    Args:
      shapes: the state as `jax.ShapeDtypeStruct`s.
      placed: its shardings in the device's memory.
    """

    def place(path: tuple, leaf: Any, sharding: NamedSharding) -> NamedSharding:
        codes = leaf.dtype == jnp.uint8 and (leaf.size < _SMALL or _cut(leaf.shape, sharding) is None)
        stays = codes or path_name(path).endswith('/scales')
        return sharding if stays else sharding.with_memory_kind(_HOST)

    return jax.tree_util.tree_map_with_path(place, shapes, placed)


def scaled(grads: Any, factor: jax.Array) -> Any:
    """Gradients multiplied in float32."""
    return jax.tree.map(lambda grad: (grad.astype(jnp.float32) * factor).astype(grad.dtype), grads)


def update_layers(
    rule: optax.GradientTransformation,
    grads: Any,
    factor: jax.Array,
    state: Any,
    params: Any,
    key: jax.Array,
    places: tuple[Any, Any],
) -> tuple[Any, Any]:
    """One update.

    Args:
      rule: the update rule, which treats every parameter by itself.
      grads: of the parameters, a tree as theirs.
      factor: what gradients are multiplied by.
      state: the rule's.
      params: the parameters.
      key: what parameters in bfloat16 are rounded with.
      places: shardings of the parameters and of the state.

    Returns:
      Parameters and state, where they were.
    """
    placed, state_placed = map(flat, places)
    update = _Update(rule, flat(grads), factor, flat(state), state_placed, key)
    leaves = flat(params)
    stacks: dict[int, _Leaves] = {}
    alone: _Leaves = {}
    for path, leaf in leaves.items():
        divided = any(tuple(placed[path].spec)[:1])
        if leaf.ndim > layer_dims(path) and leaf.size >= LARGE and not divided and update.is_stacked(path, leaf):
            stacks.setdefault(leaf.shape[0], {})[path] = leaf
        else:
            alone[path] = leaf
    for stack in stacks.values():
        leaves |= update.stack(stack)
    leaves |= update.whole(alone)
    return _like(params, leaves), _like(state, update.done)


def _like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], tree)


def _cut(shape: tuple[int, ...], sharding: NamedSharding) -> int | None:
    """The first dimension that no axis divides and that can be cut into `_PARTS`, none of them within a tile."""
    spec = (*sharding.spec, *(None,) * len(shape))
    tiles = [1] * (len(shape) - 2) + [_ROWS]
    free = [dim for dim, tile in enumerate(tiles) if not spec[dim] and shape[dim] % (_PARTS * tile) == 0]
    return free[0] if len(shape) > 1 and free else None


class _Update:
    """One update in pieces.

    Attributes:
      done: the new state's leaves by path.
    """

    def __init__(
        self,
        rule: optax.GradientTransformation,
        grads: _Leaves,
        factor: jax.Array,
        state: _Leaves,
        placed: Mapping[str, NamedSharding],
        key: jax.Array,
    ) -> None:
        self.rule, self.grads, self.factor, self.state, self.placed, self.key = rule, grads, factor, state, placed, key
        # What belongs to no parameter: counts, which every piece of the update reads as they were.
        self.shared = {path: self._fetched(path) for path, leaf in state.items() if not leaf.ndim}
        self.done: _Leaves = {}

    def _to_device(self, name: str, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, jax.memory.Space.Device) if self.placed[name].memory_kind == _HOST else leaf

    def _to_host(self, name: str, leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, jax.memory.Space.Host) if self.placed[name].memory_kind == _HOST else leaf

    def _part_of(self, name: str) -> tuple[int, int] | None:
        """Dimension and length of the parts in which a leaf comes and goes; None = whole."""
        leaf, place = self.state[name], self.placed[name]
        if place.memory_kind != _HOST or leaf.dtype != jnp.uint8:
            return None
        dim = _cut(leaf.shape, place)
        return None if dim is None else (dim, leaf.shape[dim] // _PARTS)

    def _fetched(self, name: str) -> jax.Array:
        """A leaf of the state on the device."""
        leaf, part = self.state[name], self._part_of(name)
        if part is None:
            return self._to_device(name, leaf)
        dim, size = part

        def body(i: jax.Array, out: jax.Array) -> jax.Array:
            piece = self._to_device(name, lax.dynamic_slice_in_dim(leaf, i * size, size, dim))
            return lax.dynamic_update_slice_in_dim(out, piece, i * size, dim)

        empty = lax.with_sharding_constraint(jnp.zeros(leaf.shape, leaf.dtype), self.placed[name].spec)
        return lax.fori_loop(0, _PARTS, body, empty)

    def _sent(self, name: str, new: jax.Array) -> jax.Array:
        """A leaf of the new state where the old one was."""
        part = self._part_of(name)
        if part is None:
            return self._to_host(name, new)
        dim, size = part

        def body(i: jax.Array, out: jax.Array) -> jax.Array:
            piece = self._to_host(name, lax.dynamic_slice_in_dim(new, i * size, size, dim))
            return lax.dynamic_update_slice_in_dim(out, piece, i * size, dim)

        return lax.fori_loop(0, _PARTS, body, self.state[name])

    def _template(self, params: Mapping[str, Any]) -> Any:
        """The rule's state of some parameters by themselves, as shapes."""
        return jax.eval_shape(self.rule.init, nested(params))

    def is_stacked(self, path: str, leaf: jax.Array) -> bool:
        """Whether the state of a stack of layers is the stack of their states, and as large as the parameter."""
        parts = flat(self._template({path: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)}))
        own = {name: self.state[name].shape for name in parts if name not in self.shared}
        stacked = all(shape == (leaf.shape[0], *parts[name].shape) for name, shape in own.items())
        return stacked and sum(map(math.prod, own.values())) >= leaf.size

    def _updated(
        self, params: _Leaves, grads: _Leaves, moments: _Leaves, layer: jax.Array | None = None
    ) -> tuple[_Leaves, _Leaves]:
        """New parameters, and the new state's leaves."""
        tree = nested(params)
        state = _like(self._template(params), {**self.shared, **moments})
        updates, state = self.rule.update(scaled(nested(grads), self.factor), state, tree)
        return flat(apply_updates(tree, updates, self.key, layer)), flat(state)

    def whole(self, params: _Leaves) -> _Leaves:
        """Parameters whose moments come and go whole."""
        names = [name for name in flat(self._template(params)) if name not in self.shared]
        moments = {name: self._fetched(name) for name in names}
        params, state = self._updated(params, {path: self.grads[path] for path in params}, moments)
        self.done |= {name: self._sent(name, leaf) for name, leaf in state.items()}
        return params

    def stack(self, params: _Leaves) -> _Leaves:
        """Parameters stacked over equally many layers, whose moments come and go layer by layer."""
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for path, leaf in params.items()}
        names = list(flat(self._template(shapes)))
        moments = {name: self.state[name] for name in names if name not in self.shared}
        shared = {name: self.shared[name] for name in names if name in self.shared}
        grads = {path: self.grads[path] for path in params}

        def at(leaves: _Leaves, layer: jax.Array) -> _Leaves:
            return {name: lax.dynamic_index_in_dim(leaf, layer, keepdims=False) for name, leaf in leaves.items()}

        def put(leaves: _Leaves, layer: jax.Array, new: _Leaves) -> _Leaves:
            return {name: lax.dynamic_update_index_in_dim(leaf, new[name], layer, 0) for name, leaf in leaves.items()}

        def body(layer: jax.Array, carried: tuple[_Leaves, _Leaves, _Leaves]) -> tuple[_Leaves, _Leaves, _Leaves]:
            params, moments, _ = carried
            here = {name: self._to_device(name, leaf) for name, leaf in at(moments, layer).items()}
            new, state = self._updated(at(params, layer), at(grads, layer), here, layer)
            back = {name: self._to_host(name, state[name]) for name in moments}
            return put(params, layer, new), put(moments, layer, back), {name: state[name] for name in shared}

        count = next(iter(params.values())).shape[0]
        params, moments, shared = lax.fori_loop(0, count, body, (params, moments, shared))
        self.done |= moments | {name: self._to_host(name, leaf) for name, leaf in shared.items()}
        return params
