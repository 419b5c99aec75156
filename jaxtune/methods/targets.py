"""Which weights a method changes: Hugging Face module names, as PEFT matches them, to leaves of the tree."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.errors import UserError
from jaxtune.methods.peft_experts import current
from jaxtune.models.model import Model, leaf_paths

# What gives logits; PEFT's `all-linear` leaves it alone too.
_OUTPUTS = ('lm_head/kernel', 'lm_head/decoder/kernel', 'classifier/kernel', 'score/kernel')
# What decides where a token goes, or how much an expert counts: small, and easily unbalanced by an update or four bits.
_GATES = ('/router/kernel', '/shared_expert_gate/kernel')


def modules(model: Model) -> dict[str, tuple[str, ...]]:
    """Path of every kernel and embedding -> the names of its Hugging Face modules, one for each tensor of its stack."""
    shapes = leaf_paths(model.shapes)
    names = {}
    for path, tensor in model.tensors.items():
        if path.endswith(('/kernel', '/embedding')) and not path.endswith('relative_bias/embedding'):
            names[path] = tuple(name.removesuffix('.weight') for name in tensor.names(shapes[path].shape))
    return names


def of_layers(model: Model, path: str, stack: Sequence[str]) -> list[tuple[str, ...]]:
    """The names of `modules` layer by layer: each expert's where each has a tensor."""
    stacked = model.tensors[path].stacked
    each = math.prod(leaf_paths(model.shapes)[path].shape[1:stacked])
    return [tuple(stack[i : i + each]) for i in range(0, len(stack), each)]


def linear(model: Model) -> list[str]:
    """Paths of the kernels that `all-linear` means: the experts' among them, the routers' not."""
    kernels = [path for path in modules(model) if path.endswith('/kernel') and not path.endswith(_GATES)]
    return [path for path in kernels if path not in _OUTPUTS]


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT would find a module among `target_modules`: names end as it does; a text is a regular expression.

    An expert goes by its name without its number too: `experts.gate_proj` means those of all experts.
    """
    if isinstance(targets, str):
        return any(re.fullmatch(targets, form) is not None for form in forms(name))
    return any(form == target or form.endswith(f'.{target}') for target in targets for form in forms(name))


def forms(name: str) -> tuple[str, ...]:
    """A module's name, and an expert's without its number."""
    without = re.sub(r'\.experts\.\d+\.', '.experts.', name)
    return (name,) if without == name else (name, without)


def layer_number(name: str) -> int | None:
    """The number of the layer that a module is in, None outside of the layers."""
    match = re.search(r'\.(\d+)\.', name)
    return int(match[1]) if match else None


def chosen_layers(layers: Any) -> Callable[[int | None], bool]:
    """What `method.layers` says of a layer's number: `all`, a range such as `4:8`, or numbers."""
    if layers == 'all':
        return lambda number: True
    if isinstance(layers, str):
        start, _, stop = layers.partition(':')
        numbers = range(int(start or 0), int(stop) if stop else 10**6)
    else:
        numbers = layers
    return lambda number: number is not None and number in numbers


def select(model: Model, targets: str | Sequence[str], layers: Any = 'all') -> dict[str, tuple[int, ...]]:
    """Paths of the weights to change -> numbers in the stack of the layers to change (`(0,)` without a stack).

    Args:
      model: the model.
      targets: `all-linear` and names of modules: one, several, or a text with commas between them.
      layers: as `method.layers` has it.

    Raises:
      UserError: nothing matches; names the modules that there are.
    """
    every, keep = modules(model), chosen_layers(layers)
    names = listed(targets)
    allowed = set(linear(model)) if 'all-linear' in names else ()
    names = [name for name in names if name != 'all-linear']
    for target in names:
        if not any(matches(name, (target,)) for stack in every.values() for name in stack):
            known = _known(every, target, 'all-linear')
            raise UserError(f'method.targets: {target!r} matches no module; {known}')
    selected = {}
    for path, stack in every.items():
        layers_of = of_layers(model, path, stack)
        chosen = [
            [keep(layer_number(name)) and (path in allowed or matches(name, names)) for name in layer]
            for layer in layers_of
        ]
        for marks, layer in zip(chosen, layers_of, strict=True):
            if any(marks) and not all(marks):
                raise UserError(
                    f'method.targets: chooses {layer[marks.index(True)]} and not {layer[marks.index(False)]}; expected '
                    'all experts of a layer, or none'
                )
        if numbers := tuple(i for i, marks in enumerate(chosen) if all(marks)):
            selected[path] = numbers
    if not selected:
        raise UserError(f'method.layers={layers!r}: no targeted module is in these layers; expected numbers from 0')
    return selected


def listed(targets: str | Sequence[str]) -> list[str]:
    """Names of modules, as a recipe lists them: one, several, or a text with commas between them."""
    names = targets.split(',') if isinstance(targets, str) else targets
    return [name.strip() for name in names if name.strip()]


def whole(model: Model, also_train: str | Sequence[str]) -> frozenset[str]:
    """Paths of all parameters of the modules that `method.also_train` names.

    Raises:
      UserError: a name matches nothing, or experts.
    """
    shapes, owners = leaf_paths(model.shapes), {}
    for path, tensor in model.tensors.items():
        names = tuple(name.rpartition('.')[0] for name in tensor.names(shapes[path].shape))
        owners[path] = names
    holders = {name.rpartition('.')[0] for names in owners.values() for name in names}
    # A parameter of a module that holds others, such as the sinks of attention, is none of a module to name.
    owners = {path: names for path, names in owners.items() if not holders & set(names)}
    owners = {path: (*names, *(current(name, model) for name in names)) for path, names in owners.items()}
    chosen = set()
    for target in listed(also_train):
        found = {path for path, names in owners.items() if any(matches(name, (target,)) for name in names)}
        if not found:
            raise UserError(f'method.also_train: {target!r} matches no module; {_known(owners, target)}')
        if experts := [path for path in found if '/experts/' in path]:
            raise UserError(
                f'method.also_train: {target!r} matches experts ({owners[experts[0]][0]}), which train whole with '
                'method.name=full alone; expected other modules, or a longer name'
            )
        chosen |= found
    return frozenset(chosen)


def _known(every: Mapping[str, tuple[str, ...]], target: str, other: str = '') -> str:
    lasts = sorted({name.rsplit('.', 1)[-1] for stack in every.values() for name in stack})
    near = difflib.get_close_matches(target.rsplit('.', 1)[-1], lasts, 1)
    more = f', or {other}' if other else ''
    return f'expected some of {", ".join(lasts)}{more}' + (f' (nearest: {near[0]})' if near else '')
