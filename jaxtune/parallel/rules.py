"""Ordered regular expressions on parameter paths decide how each leaf is divided over the mesh."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.errors import UserError

# The first match wins. Kernels are `[in, out]` and stacked ones `[layers, in, out]`: specs are aligned to the last
# dimensions, so one rule serves both. Column-parallel kernels divide their output over `tensor`, row-parallel ones
# their input, so that a block needs one reduction (Megatron-LM, arXiv:1909.08053). `fsdp` divides the input of both:
# XLA's TPU compiler scatters a gradient along its first dimension, and reduces it whole before it divides the second.
# So does `sequence`, whose devices would have copies otherwise, of the state too.
RULES: tuple[tuple[str, P], ...] = (
    (r'(norm|layernorm|LayerNorm)[^/]*/(scale|bias)$', P()),
    (r'experts/[^/]+/bias$', P('expert', None)),
    (r'/(scale|bias|correction|sinks)$', P()),
    (r'experts/down_proj/kernel$', P('expert', 'tensor', 'fsdp')),
    (r'experts/[^/]+/kernel$', P('expert', 'fsdp', 'tensor')),
    (r'(o_proj|down_proj)/kernel$', P(('tensor', 'fsdp', 'sequence'), None)),
    (r'/kernel$', P(('fsdp', 'sequence'), 'tensor')),
    (r'/prefix/[kv]$', P('tensor', None)),
    (r'embed_positions/embedding$', P(None, 'fsdp')),
    (r'/embedding$', P('tensor', 'fsdp')),
)

LARGE = 2**20  # elements; a leaf this large is divided by another axis or dimension where its rule's do not divide it


def path_name(path: Sequence) -> str:
    """A key path of `jax.tree_util` as `a/b/c`."""
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path)


def _fit(spec: P, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """Aligns a spec to the last dimensions and leaves out axes that do not divide theirs."""
    entries: tuple[Any, ...] = (None,) * (len(shape) - len(spec)) + tuple(spec)[max(0, len(spec) - len(shape)) :]
    fitted = []
    for size, entry in zip(shape, entries, strict=True):
        named = (entry,) if isinstance(entry, str) else (entry or ())
        axes = tuple(axis for axis in named if mesh_shape.get(axis, 1) > 1)
        while axes and size % math.prod(mesh_shape[axis] for axis in axes):
            axes = axes[:-1]
        fitted.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*fitted)


def _fit_anywhere(shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """Divides the longer of the last two dimensions that an axis divides; a scan slices those before, the layers."""
    for dim in sorted(range(max(0, len(shape) - 2), len(shape)), key=lambda dim: -shape[dim]):
        for axis in ('fsdp', 'tensor'):
            spec = _fit(P(*(axis if i == dim else None for i in range(len(shape)))), shape, mesh_shape)
            if any(spec):
                return spec
    return P()


def match_rules(shapes: Any, mesh: Mesh, rules: Sequence[tuple[str, P]] = RULES, large: int = LARGE) -> Any:
    """The tree of `PartitionSpec`s of a parameter tree.

    A large leaf that its rule leaves whole is divided wherever an axis can. What a typed leaf says may be copied, such
    as LoRA's factors, is copied where none can; a base weight is refused.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: the mesh whose axes the rules name.
      rules: ordered `(regex, spec)`; a spec is aligned to a leaf's last dimensions.
      large: leaves with at least this many elements must be divided where the mesh has `fsdp` or `tensor` > 1.

    Raises:
      UserError: a leaf that no rule matches, or a large base weight that would be copied to every device.
    """
    sizes = dict(mesh.shape)
    divided = sizes.get('fsdp', 1) * sizes.get('tensor', 1) > 1

    def fitted(name: str, rule: P, shape: tuple[int, ...], may_copy: bool = False) -> P:
        spec = _fit(rule, shape, sizes)
        if not divided or math.prod(shape) < large or any(spec):
            return spec
        spec = _fit_anywhere(shape, sizes)
        if not any(spec) and not may_copy and len(rule):  # a rule without dimensions asks for copies
            raise UserError(
                f'parameter {name} {tuple(shape)} would be copied to every device: neither mesh.fsdp={sizes["fsdp"]} '
                f'nor mesh.tensor={sizes["tensor"]} divides one of its last two dimensions; expected one that does'
            )
        return spec

    def spec_of(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        rule = next((rule for pattern, rule in rules if re.search(pattern, name)), None)
        if rule is None:
            raise UserError(f'parameter {name} {tuple(leaf.shape)}: no partition rule matches this path')
        if _derives(leaf):
            return leaf.specs(rule, functools.partial(fitted, name))
        return fitted(name, rule, leaf.shape)

    return jax.tree_util.tree_map_with_path(spec_of, shapes, is_leaf=_derives)


def _derives(leaf: Any) -> bool:
    """Whether a node is a typed leaf, which derives its arrays' specs from that of the kernel that it stands for."""
    return hasattr(leaf, 'specs')


def state_specs(state_shapes: Any, param_shapes: Any, param_specs: Any) -> Any:
    """Specs of an optimizer state: a leaf under a parameter's path lies as that parameter does.

    Adafactor's moments of rows and columns lack one of its dimensions, and a moment in eight bits has `codes` and
    `scales` where the parameter has one array. What belongs to no parameter (counters) is replicated.
    """
    flat_shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes)}
    is_spec: Callable = lambda x: isinstance(x, P)  # noqa: E731
    flat_specs = {
        path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(param_specs, is_leaf=is_spec)
    }

    def spec_of(path: tuple, leaf: Any) -> Any:
        keys = path_name(path).split('/')
        ends = (len(keys), len(keys) - 1) if keys[-1] in ('codes', 'scales', 'row', 'col') else (len(keys),)
        names = ('/'.join(keys[start:end]) for end in ends for start in range(len(keys)))
        name = next((name for name in names if name in flat_shapes), None)
        if name is None:
            return P()
        shape = flat_shapes[name]
        spec = (*flat_specs[name], *(None,) * (len(shape) - len(flat_specs[name])))
        if leaf.shape == shape:
            return P(*spec)
        if keys[-1] == 'scales':
            return P(*spec[: len(leaf.shape) - 1], None)
        return P(*spec[:-1]) if keys[-1] == 'row' else P(*spec[:-2], spec[-1])

    return jax.tree_util.tree_map_with_path(spec_of, state_shapes)


def copied_bytes(tree: Any) -> int:
    """Bytes of the arrays that lie whole on every device of a mesh that divides others of them (`fsdp`, `tensor`)."""

    def copied(sharding: Any) -> bool:
        mesh = getattr(sharding, 'mesh', None)
        divides = mesh is not None and mesh.shape.get('fsdp', 1) * mesh.shape.get('tensor', 1) > 1
        return divides and sharding.is_fully_replicated

    leaves = [leaf for leaf in jax.tree.leaves(tree) if copied(getattr(leaf, 'sharding', None))]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """A tree of `PartitionSpec`s as a tree of `NamedSharding`s on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def with_shardings(shapes: Any, placed: Any) -> Any:
    """A tree of shapes that say where each leaf lies."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )
