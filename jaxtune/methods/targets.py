"""Which weights a method changes: Hugging Face module names, as PEFT matches them, to leaves of the tree."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.model import Model, leaf_paths

# What gives logits; PEFT's `all-linear` leaves it alone too.
_OUTPUTS = ('lm_head/kernel', 'lm_head/decoder/kernel', 'classifier/kernel', 'score/kernel')


def modules(model: Model) -> dict[str, tuple[str, ...]]:
    """Path of every kernel and embedding -> the name of its Hugging Face module, one for each stacked layer."""
    shapes = leaf_paths(model.shapes)
    names = {}
    for path, tensor in model.tensors.items():
        if path.endswith(('/kernel', '/embedding')) and not path.endswith('relative_bias/embedding'):
            count = shapes[path].shape[0] if tensor.stacked else 1
            names[path] = tuple(name.removesuffix('.weight') for name in tensor.names(count))
    return names


def linear(model: Model) -> list[str]:
    """Paths of the kernels that `all-linear` means."""
    return [path for path in modules(model) if path.endswith('/kernel') and path not in _OUTPUTS]


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT would find a module among `target_modules`: names end as it does; a text is a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f'.{target}') for target in targets)


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
    names = [name.strip() for name in targets.split(',')] if isinstance(targets, str) else list(targets)
    allowed = set(linear(model)) if 'all-linear' in names else ()
    names = [name for name in names if name != 'all-linear']
    for target in names:
        if not any(matches(name, (target,)) for stack in every.values() for name in stack):
            raise UserError(f'method.targets: {target!r} matches no module; {_known(every, target)}')
    selected = {}
    for path, stack in every.items():
        numbers = tuple(
            i for i, name in enumerate(stack) if keep(layer_number(name)) and (path in allowed or matches(name, names))
        )
        if numbers:
            selected[path] = numbers
    if not selected:
        raise UserError(f'method.layers={layers!r}: no targeted module is in these layers; expected numbers from 0')
    return selected


def _known(every: Mapping[str, tuple[str, ...]], target: str) -> str:
    lasts = sorted({name.rsplit('.', 1)[-1] for stack in every.values() for name in stack})
    near = difflib.get_close_matches(target.rsplit('.', 1)[-1], lasts, 1)
    return f'expected some of {", ".join(lasts)}, or all-linear' + (f' (nearest: {near[0]})' if near else '')
