"""Mixtures of experts in PEFT's format: names of modules in `transformers` 5, and factors of all experts in one tensor.

`transformers` 5 keeps a layer's experts in two parameters, `experts.gate_up_proj` and `experts.down_proj`, and PEFT (as
of 0.21) tunes such a one by `target_parameters`. Its factors are `lora_A [experts * rank, in]`, the ranks of one expert
after those of another, and `lora_B [out, rank * experts]`, the experts of one rank after those of another. Where both
are tuned, the wrapper of the first is the `base_layer` of the second's. Before, each expert's layer was a module,
`experts.0.gate_proj`: both forms are read.
"""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.models.model import Model, leaf_paths

# Where both are tuned, the first is inside.
PARAMETERS = ('gate_up_proj', 'down_proj')
# Modules that `transformers` 5 calls otherwise than a folder does.
_RENAMED = {'mixtral': ('.block_sparse_moe', '.mlp'), 'granitemoe': ('.router.layer', '.router')}
# Last parts of names that PEFT takes for those of experts and routers, whatever module they are of.
_TAKEN_FOR_EXPERTS = ('gate', 'gate_proj', 'up_proj', 'down_proj', 'w1', 'w2', 'w3')


class Factors(NamedTuple):
    """LoRA's of one weight, or of all experts of a layer: `a [*experts, in, rank]`, `b [*experts, rank, out]`."""

    a: np.ndarray
    b: np.ndarray
    scale: np.ndarray  # [*experts]


class Place(NamedTuple):
    """Which part of which parameter of `transformers` 5 an expert's kernel is.

    Attributes:
      module: name of the experts, with `{}` for the layer's number.
      parameter: one of `PARAMETERS`.
      half: 0 or 1 of its outputs, None = all of it.
    """

    module: str
    parameter: str
    half: int | None = None


def current(name: str, model: Model) -> str:
    """The name that a module of a folder has in `transformers` 5."""
    return name.replace(*_RENAMED.get(model.hf_config['model_type'], ('', '')), 1)


def is_parameter(path: str, model: Model) -> bool:
    """Whether PEFT reaches a kernel outside of experts as a parameter `weight` alone, because of its name or kind."""
    if getattr(model.config, 'experts', None) is None or not path.endswith('/kernel'):
        return False
    last = model.tensors[path].name.removesuffix('.weight').rsplit('.', 1)[-1]
    return path.endswith('/router/kernel') or last in _TAKEN_FOR_EXPERTS


def place(path: str, model: Model) -> Place | None:
    """Where an expert's kernel lies; None for another leaf."""
    match = re.search(r'/experts/(\w+)/kernel$', path)
    if match is None:
        return None
    block = re.match(r'(.+?\.\{\}\.\w+)\.', model.tensors[path].name)
    assert block is not None  # the name of a layer's tensor
    module = f'{current(block[1], model)}.experts'
    halves = {'gate_proj': 0, 'up_proj': 1}
    if match[1] in halves:
        return Place(module, 'gate_up_proj', halves[match[1]])
    return Place(module, match[1])


def places(model: Model) -> dict[str, Place]:
    """The places of all experts' kernels by their paths."""
    found = {path: place(path, model) for path in model.tensors}
    return {path: where for path, where in found.items() if where}


def numbers(path: str, model: Model) -> tuple[int, ...]:
    """Of the layers that a leaf is stacked over."""
    return model.tensors[path].numbers or tuple(range(leaf_paths(model.shapes)[path].shape[0]))


def fused(model: Model, parts: Mapping[str, Mapping[int, Factors]]) -> Iterator[tuple[str, str, Factors]]:
    """Factors of the parameters of experts: `(module, parameter, factors)`.

    Args:
      model: the model.
      parts: path of an expert's kernel -> place in its stack -> factors.
    """
    found: dict[tuple[str, str], dict[int | None, Factors]] = {}
    for path, layers in parts.items():
        where = place(path, model)
        assert where is not None  # a kernel of experts
        for at, factors in layers.items():
            name = where.module.format(numbers(path, model)[at])
            found.setdefault((name, where.parameter), {})[where.half] = factors
    width = model.config.experts.d_ff if parts else 0
    for (module, parameter), halves in found.items():
        yield module, parameter, halves[None] if None in halves else _joined(dict(sorted(halves.items())), width)


def _joined(halves: Mapping[int | None, Factors], width: int) -> Factors:
    """One pair for gates and the rest: ranks side by side, each reaching its own half of the outputs."""
    a = np.concatenate([part.a for part in halves.values()], -1)
    b = [np.pad(part.b, ((0, 0), (0, 0), (0, width) if half == 0 else (width, 0))) for half, part in halves.items()]
    scale = next(iter(halves.values())).scale
    b = [rows * (part.scale / scale)[:, None, None] for rows, part in zip(b, halves.values(), strict=True)]
    return Factors(a, np.concatenate(b, -2), scale)


def flat(factors: Factors) -> tuple[np.ndarray, np.ndarray, float]:
    """PEFT's `lora_A`, `lora_B` and one scale of all experts' factors."""
    a, b, scale = factors
    b = b * (scale / scale[0])[:, None, None]
    return a.swapaxes(-1, -2).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1), float(scale[0])


def tensors(module: str, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tensors by name of a layer's `lora_A` and `lora_B` by parameter."""
    inside = [name for name in PARAMETERS if name in pairs]
    named = {}
    for depth, parameter in enumerate(reversed(inside)):
        wrapper = module + '.base_layer' * depth
        named |= {f'{wrapper}.lora_{x}.weight': pair for x, pair in zip('AB', pairs[parameter], strict=True)}
    return named


class Reader:
    """Which tensors of an adapter are factors of all experts of a layer, and what they are here.

    Args:
      folder: of the adapter, for messages.
      config: its config.
      model: the model.
    """

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any], model: Model) -> None:
        self.folder, self.model = folder, model
        self.targets = tuple(config.get('target_parameters') or ())
        self.modules: dict[str, dict[tuple[str, int | None], tuple[str, int]]] = {}
        for path, where in places(model).items():
            for at, number in enumerate(numbers(path, model)):
                own = self.modules.setdefault(where.module.format(number), {})
                own[where.parameter, where.half] = path, at

    def targeted(self, name: str) -> bool:
        """Whether `target_parameters` names a parameter, as PEFT matches it."""
        return any(name == target or name.endswith(f'.{target}') for target in self.targets)

    def find(self, module: str) -> tuple[str, int] | None:
        """`(module, depth)` of the wrapper that a name is of, None where it is none of experts."""
        inner = module.removesuffix('.base_layer')
        depth = 0
        while inner != module:
            module, inner, depth = inner, inner.removesuffix('.base_layer'), depth + 1
        return (module, depth) if module in self.modules else None

    def read(
        self, module: str, pairs: Mapping[int, Mapping[str, np.ndarray]]
    ) -> Iterator[tuple[str, int, str, int, Factors]]:
        """`(parameter, its rank, path, place in its stack, factors)` of a layer's kernels, scales still 1.

        Args:
          module: the experts of a layer.
          pairs: `lora_A` and `lora_B` by the depth of their wrapper.

        Raises:
          UserError: they do not fit the model.
        """
        tuned = [name for name in PARAMETERS if self.targeted(f'{module}.{name}')]
        if sorted(pairs) != list(range(len(tuned))):
            raise self._wrong(
                f'{module} has {len(pairs)} pairs of factors; expected one for each of target_parameters, here '
                f'{" and ".join(tuned) or "none"}'
            )
        shapes = leaf_paths(self.model.shapes)
        for depth, parameter in enumerate(reversed(tuned)):
            parts = {half: where for (name, half), where in self.modules[module].items() if name == parameter}
            count, inputs, outputs = shapes[next(iter(parts.values()))[0]].shape[1:]
            a, b = (pairs[depth].get(f'lora_{x}', np.zeros((0, 0), np.float32)) for x in 'AB')
            rank = a.shape[0] // count
            if not rank or (*a.shape, *b.shape) != (rank * count, inputs, outputs * len(parts), rank * count):
                raise self._wrong(
                    f'{module}.{parameter} is {count} times {inputs} x {outputs * len(parts)} here, in the adapter '
                    f'{[list(a.shape), list(b.shape)]}'
                )
            wide = Factors(
                a.reshape(count, rank, inputs).swapaxes(-1, -2),
                b.reshape(-1, rank, count).transpose(2, 1, 0),
                np.ones(count, np.float32),
            )
            for half, factors in _split(wide, len(parts)).items():
                path, at = parts[half]
                yield parameter, rank, path, at, factors

    def _wrong(self, what: str) -> UserError:
        return UserError(f'{self.folder}: an adapter for another base: {what}')


def _split(wide: Factors, count: int) -> dict[int | None, Factors]:
    """Undoes `_joined`; a pair whose ranks reach both halves becomes that of each."""
    if count == 1:
        return {None: wide}
    halves = np.split(wide.b, 2, -1)
    used = [np.flatnonzero(np.abs(b).max((0, 2))) for b in halves]
    if len(used[0]) and len(used[1]) and used[0][-1] < used[1][0]:
        cut = used[1][0]
        return {
            0: Factors(wide.a[..., :cut], halves[0][:, :cut], wide.scale),
            1: Factors(wide.a[..., cut:], halves[1][:, cut:], wide.scale),
        }
    there = [half for half in (0, 1) if len(used[half])] or [0, 1]
    return {half: Factors(wide.a, halves[half], wide.scale) for half in there}


def short_names(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """Names without the layer's number where they mean exactly these, else whole ones."""
    chosen = set(chosen)
    short = {in_layer(name) for name in chosen}
    meant = {name for name in every if any(name == end or name.endswith(f'.{end}') for end in short)}
    return sorted(short if meant == chosen else chosen)


def in_layer(name: str) -> str:
    """A name without what comes before its layer's modules."""
    return re.sub(r'^.*?\.\d+\.', '', name)
