"""From a model's parameters to a tuning method's: stored as it asks, with what it adds, divided by what trains."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtune.errors import UserError
from jaxtune.methods import BoundMethod, Method, targets
from jaxtune.models import value_head
from jaxtune.models.model import Model, leaf_paths
from jaxtune.parallel import match_rules, shardings
from jaxtune.parallel.rules import with_shardings
from jaxtune.weights import Codec, is_weight, tree

# Rows of added tokens train with every method that leaves the table beside them frozen.
_NEW_ROWS = re.compile(r'(^|/)(kernel|embedding)/rows$')

# Heads that are trained whole with every method: they belong to the task, not to the pretrained model.
_TASK_HEADS = ('classifier', 'score', value_head.NAME)


def codecs(method: BoundMethod, model: Model, fresh: frozenset[str] = frozenset()) -> dict[str, Codec]:
    """How a method stores kernels: path -> codec, but for weights that the folder lacks, or that train whole."""
    chosen, plain = method.method.codecs(model, method.settings), fresh | also_trained(method, model)
    return {path: codec for path, codec in chosen.items() if path not in plain}


def also_trained(method: BoundMethod, model: Model) -> frozenset[str]:
    """Paths of the model's own leaves that the recipe lets train whole beside what the method adds.

    Raises:
      UserError: `method.also_train` names what is not there.
    """
    if method.method.name == 'full':
        return frozenset()
    return targets.whole(model, method.settings.also_train)


def check_also_trained(params: Any, model: Model, also: frozenset[str], adapter: str) -> None:
    """Refuses to train whole what an adapter changes in its own way.

    Raises:
      UserError: names the module.
    """
    leaves = leaf_paths(params)
    for path in sorted(also):
        if is_weight(leaves[path]):
            name = model.tensors[path].name.removesuffix('.weight').replace('{}', '*')
            raise UserError(f'method.also_train: {name} is adapted by method.path={adapter}; expected other modules')


def encoded(params: Any, chosen: Mapping[str, Codec]) -> Any:
    """A tree of plain arrays with the chosen kernels as typed leaves; for tracing."""
    leaves = leaf_paths(params)
    return tree.nested({p: chosen[p].encode_kernel(leaf) if p in chosen else leaf for p, leaf in leaves.items()})


def attach(init: Callable[..., Any], params: Any, mesh: Mesh, *extra: Any) -> Any:
    """`init(params, *extra)`, of which only what is new is computed, straight on its devices.

    Of a tree of shapes, nothing is: the result is a tree of shapes.

    Args:
      init: makes a tree around the arrays of another, such as a method's.
      params: that other tree; its arrays stay where they are.
      mesh: the mesh.
      extra: further arrays.
    """
    given, structure = jax.tree.flatten(params)
    origin: list[int | None] = []
    out_structures: list[Any] = []

    def new(leaves: list, extra: tuple) -> list:
        out, out_structure = jax.tree.flatten(init(jax.tree.unflatten(structure, leaves), *extra))
        numbers = {id(leaf): i for i, leaf in enumerate(leaves)}
        origin[:], out_structures[:] = [numbers.get(id(leaf)) for leaf in out], [out_structure]
        return [leaf for leaf in out if id(leaf) not in numbers]

    shapes = iter(jax.eval_shape(new, given, extra))
    whole = jax.tree.unflatten(out_structures[0], [next(shapes) if i is None else given[i] for i in origin])
    specs = jax.tree.leaves(match_rules(whole, mesh), is_leaf=lambda spec: isinstance(spec, P))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in given):
        placed = shardings(specs, mesh)
        return jax.tree.unflatten(out_structures[0], with_shardings(jax.tree.leaves(whole), placed))
    wanted = [spec for spec, i in zip(specs, origin, strict=True) if i is None]
    added = iter(jax.jit(new, out_shardings=shardings(wanted, mesh))(given, extra))
    return jax.tree.unflatten(out_structures[0], [next(added) if i is None else given[i] for i in origin])


def begin(method: BoundMethod, model: Model, params: Any, fresh: frozenset[str], tokenizer: Any = None) -> Any:
    """What the method makes of the loaded parameters; weights that the folder lacked are left to be trained whole."""
    rng = jax.random.key(method.seed)
    leaves = leaf_paths(params)
    pretrained = tree.nested({path: leaf for path, leaf in leaves.items() if path not in fresh})
    tuned = leaf_paths(method.method.init(pretrained, model, method.settings, rng, tokenizer))
    # Targeted or not: what trains whole gets nothing beside it.
    plain = fresh | also_trained(method, model)
    return tree.nested(tuned | {path: leaf for path, leaf in leaves.items() if path in plain})


def partition(method: Method, params: Any, fresh: frozenset[str]) -> tuple[Any, Any]:
    """`(trainable, frozen)` halves of the method's tree."""
    return tree.partition(params, trains(method, fresh))


def trains(method: Method, fresh: frozenset[str]) -> Callable[[str], bool]:
    """Whether a leaf trains: the method says so, the model lacked it, or it is the task's own head or a new row."""
    return lambda path: (
        method.trains(path) or path in fresh or path.split('/')[0] in _TASK_HEADS or bool(_NEW_ROWS.search(path))
    )


def whole_paths(params: Any, method: Method, fresh: frozenset[str]) -> tuple[str, ...]:
    """Paths of the model's own leaves that train whole beside what the method adds."""
    test = trains(method, fresh)
    return tuple(path for path, leaf in leaf_paths(params).items() if test(path) and not method.trains(path))
