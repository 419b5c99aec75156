"""LoRA in PEFT's format, read and written: rsLoRA, DoRA, rank and alpha patterns, PiSSA and OLoRA."""

import collections
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError, parsing, shown
from jaxtune.methods import AdapterArrays, Attach, peft, peft_tied, peft_tokens, targets
from jaxtune.methods.lora_init import pissa_start
from jaxtune.methods.peft_experts import (
    Factors,
    Reader,
    current,
    flat,
    fused,
    in_layer,
    is_parameter,
    numbers,
    place,
    places,
    short_names,
    tensors,
)
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry
from jaxtune.weights import LoRA
from jaxtune.weights.tree import nested


def read(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[Attach, AdapterArrays]:
    """Reads an adapter of `peft_type=LORA`; see `peft.reader`."""
    layers_of, saved = _by_layers(folder, config, entries, model)
    shapes, every = leaf_paths(model.shapes), targets.modules(model)
    arrays, layers, starts = {}, {}, {}
    for path, stack in layers_of.items():
        shape, numbers = shapes[path].shape, tuple(sorted(stack))
        parts = [stack[i] for i in numbers]
        rank = max(part['a'].shape[-1] for part in parts)
        leaf = {name: np.stack([_filled(name, part[name], rank) for part in parts]) for name in parts[0]}
        start = config.get('init_lora_weights')
        if start in ('pissa', 'olora') and not path.endswith('embedding'):
            starts[path] = start
        if config.get('use_dora') and path.endswith('embedding'):
            name = every[path][0]
            raise UserError(f'{folder / peft.CONFIG}: use_dora=true: not in this version for {name}, an embedding')
        stacked = len(shape) > 2
        arrays[path] = leaf if stacked else {name: value[0] for name, value in leaf.items()}
        layers[path] = numbers if stacked and len(numbers) < shape[0] else None
    whole = peft.whole_leaves(folder, saved, model)
    dropout = float(config.get('lora_dropout') or 0.0)

    def init(params: Any, arrays: AdapterArrays) -> Any:
        factors, whole, _ = arrays
        leaves = {**leaf_paths(params), **whole}
        for path, leaf in factors.items():
            lora = LoRA(leaves[path], dropout=dropout, layers=layers[path], **leaf)
            leaves[path] = pissa_start(lora, starts[path]) if path in starts else lora
        return nested(leaves)

    return init, AdapterArrays(arrays, whole)


def _filled(name: str, value: np.ndarray, rank: int) -> np.ndarray:
    """Factors filled up with zeros to a rank; other parts as they are."""
    axis = {'a': -1, 'b': -2}.get(name)
    if axis is None:
        return value
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, rank - value.shape[axis])
    return np.pad(value, widths)


# Path of a weight, or name of a module -> place in its stack of layers, or wrapper -> parts of a LoRA leaf.
_Layers = dict[str, dict[int, dict[str, np.ndarray]]]


def _by_layers(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[_Layers, dict[str, Entry]]:
    """An adapter's factors by layer, those of a layer's experts together; and its tensors that are no factors."""
    every, reader = targets.modules(model), Reader(folder, config, model)
    places = {name: (path, i) for path, stack in every.items() for i, name in enumerate(stack)}
    places |= {current(name, model): where for name, where in places.items()}
    modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    experts: dict[str, dict[int, dict[str, np.ndarray]]] = collections.defaultdict(
        lambda: collections.defaultdict(dict)
    )
    saved = {}
    for name, entry in entries.items():
        match = re.fullmatch(r'(.*)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(\.weight)?', name)
        if not match:
            if '.base_layer.' not in name:  # an embedding's own rows, which PEFT writes beside its factors
                saved[name] = entry
            continue
        module, part = match[1], match[2].replace('embedding_', '')
        if module in places:
            value = peft.float_values(entry)
            modules[module][part] = value if part.endswith('vector') else value.T  # [in, rank] and [rank, out]
        elif found := reader.find(module):
            experts[found[0]][found[1]][part] = peft.float_values(entry)
        else:
            raise peft.wrong_base(folder, f'it changes {module}, which this model does not have')

    shapes = leaf_paths(model.shapes)
    singles: _Layers = collections.defaultdict(dict)
    for module, part in modules.items():
        path, i = places[module]
        shape = shapes[path].shape[-2:]
        if (
            not {'lora_A', 'lora_B'} <= set(part)
            or part['lora_A'].ndim != 2
            or (part['lora_A'].shape[0], part['lora_B'].shape[-1]) != shape
        ):
            sizes = {name: list(value.shape[::-1]) for name, value in part.items()}
            raise peft.wrong_base(folder, f'{module} is {shape[0]} x {shape[1]} here, in the adapter {sizes}')
        if config.get('use_dora') and len(part) < 3 and not path.endswith('embedding'):
            raise UserError(f'{folder}/{peft.WEIGHTS}: use_dora=true, but {module} has no lora_magnitude_vector')
        key = f'{module}.weight' if reader.targeted(f'{module}.weight') else module
        scale = np.float32(_scale(config, key, part['lora_A'].shape[1]))
        leaf = {'a': part['lora_A'], 'b': part['lora_B'], 'scale': scale}
        if config.get('use_dora') and 'lora_magnitude_vector' in part:
            leaf['magnitude'] = part['lora_magnitude_vector']
        singles[path][i] = leaf
    layers = {
        path: _of_experts(folder, path, stack, model) if len(shapes[path].shape) > 3 else stack
        for path, stack in singles.items()
    }
    for module, pairs in experts.items():
        for parameter, rank, path, at, factors in reader.read(module, pairs):
            name = f'{module}.{parameter}'
            if (r := _by_pattern(config, 'rank_pattern', name, config.get('r'))) not in (rank, None):
                raise peft.wrong_base(folder, f'{name} has factors of rank {rank} here, by its config of {r}')
            scale = np.float32(_scale(config, name, rank))
            layers.setdefault(path, {})[at] = {'a': factors.a, 'b': factors.b, 'scale': factors.scale * scale}
    return layers, saved


def _of_experts(
    folder: pathlib.Path, path: str, stack: Mapping[int, dict[str, np.ndarray]], model: Model
) -> dict[int, dict[str, np.ndarray]]:
    """The factors of single experts, layer by layer; those of experts that have none are zeros, which never move."""
    _, count, inputs, outputs = leaf_paths(model.shapes)[path].shape
    layers = {}
    for at in sorted({i // count for i in stack}):
        parts = {i: stack[at * count + i] for i in range(count) if at * count + i in stack}
        first = next(iter(parts.values()))
        if 'magnitude' in first and len(parts) < count:
            lacking = min(set(range(count)) - set(parts))
            raise UserError(f'{folder}: use_dora=true, but expert {lacking} of {path} has no factors, others have')
        rank = max(part['a'].shape[-1] for part in parts.values())
        none = {
            'a': np.zeros((inputs, 0), np.float32),
            'b': np.zeros((0, outputs), np.float32),
            'scale': first['scale'],
        }
        all_parts = [parts.get(i, none) for i in range(count)]
        layers[at] = {name: np.stack([_filled(name, part[name], rank) for part in all_parts]) for name in first}
    return layers


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = _by_pattern(config, 'alpha_pattern', name, config['lora_alpha'])
    return alpha / (rank**0.5 if config.get('use_rslora') else rank)


def _by_pattern(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    """What the first pattern of a field that a name ends with stands for."""
    for pattern, value in (config.get(field) or {}).items():
        with parsing(f'{peft.CONFIG}: {field}: {shown(pattern)}'):
            matched = re.fullmatch(rf'(.*\.)?({pattern})', name)
        if matched:
            return value
    return default


class _Adapter:
    """What is written of LoRA: tensors, ranks and alphas by PEFT's names, which are modules or parameters."""

    def __init__(self, rslora: bool) -> None:
        self.rslora = rslora
        self.tensors: dict[str, np.ndarray] = {}
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.parameters: set[str] = set()

    def scale(self, name: str, rank: int, scale: float, parameter: bool = False) -> None:
        """Notes how a module is scaled, or a parameter."""
        self.ranks[name] = rank
        self.alphas[name] = scale * (rank**0.5 if self.rslora else rank)
        self.parameters |= {name} if parameter else set()

    def patterns(self, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(common, others)`: the commonest value, and regular expressions of the names that have another."""
        common = _commonest(values)
        kinds = collections.defaultdict(set)
        for name in self.parameters:
            kinds[in_layer(name)].add(values[name])
        alike = {name: in_layer(name) for name in self.parameters if len(kinds[in_layer(name)]) == 1}
        return common, {re.escape(alike.get(name, name)): v for name, v in values.items() if v != common}


def save(
    folder: pathlib.Path, params: Any, model: Model, settings: Settings, base: str, whole: Iterable[str] = ()
) -> None:
    """Writes a tree's LoRA leaves as PEFT's LoRA.

    Those of experts go out as `target_parameters`, as PEFT has them with `transformers` 5, which has no DoRA of them:
    with DoRA each expert is a module, as before.

    Args:
      folder: the folder; an older one is replaced.
      params: the tree.
      model: the model.
      settings: the recipe's `method`.
      base: name or path of the base.
      whole: paths of further leaves that were trained whole.
    """
    leaves = leaf_paths(params)
    loras = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRA)}
    every = targets.modules(model)
    named = {name for stack in every.values() for name in stack}
    dora = any(leaf.magnitude is not None for leaf in loras.values())
    adapter, experts = _Adapter(bool(settings.rslora)), {}
    for path, leaf in loras.items():
        names = targets.of_layers(model, path, every[path])
        parts = _parts(leaf)
        if place(path, model) and not dora:
            experts[path] = {at: factors for at, (factors, _) in parts.items()}
            continue
        for at, (factors, magnitude) in parts.items():
            for i, name in enumerate(names[at]):
                one, own = (factors, magnitude) if len(names[at]) == 1 else _of_expert(factors, magnitude, i)
                _write_module(adapter, path, name, one, own, model, parameter=not dora and is_parameter(path, model))
    pairs: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for module, parameter, factors in fused(model, experts):
        a, b, scale = flat(factors)
        pairs[module][parameter] = a, b
        adapter.scale(f'{module}.{parameter}', factors.a.shape[-1], scale, parameter=True)
    for module, own in pairs.items():
        adapter.tensors |= {f'{peft.NAME_PREFIX}{name}': value for name, value in tensors(module, own).items()}
    (rank, ranks), (alpha, alphas) = adapter.patterns(adapter.ranks), adapter.patterns(adapter.alphas)
    modules = set(adapter.ranks) - adapter.parameters
    saved = peft.whole_tensors(leaves, whole, model)
    fields = {
        'peft_type': 'LORA',
        'r': rank,
        'lora_alpha': alpha,
        # PEFT refuses dropout beside `target_parameters`; it is of training alone.
        'lora_dropout': 0.0 if adapter.parameters else float(settings.dropout),
        'target_modules': _short_names(modules, named | modules),
        'rank_pattern': ranks,
        'alpha_pattern': alphas,
        'use_rslora': adapter.rslora,
        'use_dora': dora,
        'bias': 'none',
        'fan_in_fan_out': model.hf_config['model_type'] == 'gpt2',
        'init_lora_weights': True,
        'modules_to_save': peft.modules_to_save(saved) or None,
    }
    if adapter.parameters:
        fields['target_parameters'] = short_names(adapter.parameters, _parameters(model))
    changed = model.tie and (isinstance(leaves[model.tie.table], LoRA) or model.tie.table in set(whole))
    fields['ensure_weight_tying'] = bool(changed and peft_tied.ensures(model))
    token_fields, rows = peft.token_rows(leaves, model)
    readme = peft_tokens.readme(leaves, model, base)
    peft.write(folder, fields | token_fields, adapter.tensors | saved | rows, model, base, readme)


def _parameters(model: Model) -> set[str]:
    """Names of all parameters that `target_parameters` could mean."""
    found = {
        f'{where.module.format(number)}.{where.parameter}'
        for path, where in places(model).items()
        for number in numbers(path, model)
    }
    modules = {name for path, stack in targets.modules(model).items() if not place(path, model) for name in stack}
    return found | {f'{current(name, model)}.weight' for name in modules}


def _write_module(
    adapter: _Adapter, path: str, name: str, factors: Factors, magnitude: Any, model: Model, parameter: bool
) -> None:
    for where in peft_tied.places(model, path, name):
        module = current(where.name, model) if parameter else where.name
        key = f'{module}.weight' if parameter else module
        adapter.scale(key, factors.a.shape[1], float(factors.scale), parameter)
        looked_up = path.endswith('embedding') and not where.flipped
        marks = ('lora_embedding_A', 'lora_embedding_B') if looked_up else ('lora_A.weight', 'lora_B.weight')
        pair = (factors.b, factors.a) if where.flipped else (factors.a.T, factors.b.T)
        adapter.tensors |= {f'{peft.NAME_PREFIX}{module}.{mark}': x for mark, x in zip(marks, pair, strict=True)}
    if magnitude is not None:
        adapter.tensors[f'{peft.NAME_PREFIX}{name}.lora_magnitude_vector'] = magnitude


def _parts(leaf: LoRA) -> dict[int, tuple[Factors, np.ndarray | None]]:
    """Factors of each layer by its place in the stack, and magnitudes; of the rank that is used."""
    found = {}
    host = _on_host(leaf)
    stacked = len(leaf.shape) > 2
    for row, at in enumerate(leaf.layers or (range(leaf.shape[0]) if stacked else (0,))):
        own = {name: value[row] if stacked else value for name, value in host.items()}
        if leaf.shared:  # the same factors for each expert
            own = {name: np.broadcast_to(value, (leaf.shape[1], *value.shape)) for name, value in own.items()}
        rank = _used_rank(own['a'], own['b'])
        a, b = own['a'][..., :rank], own['b'][..., :rank, :]
        if 'a_start' in own:
            start = own['a_start'][..., :rank], own['b_start'][..., :rank, :]
            a, b = np.concatenate([a, start[0]], -1), np.concatenate([b, -start[1]], -2)
        found[at] = Factors(a, b, own['scale']), own.get('magnitude')
    return found


def _of_expert(factors: Factors, magnitude: np.ndarray | None, i: int) -> tuple[Factors, np.ndarray | None]:
    rank = _used_rank(factors.a[i], factors.b[i])
    one = Factors(factors.a[i, :, :rank], factors.b[i, :rank], factors.scale[i])
    return one, None if magnitude is None else magnitude[i]


def _on_host(leaf: LoRA) -> dict[str, np.ndarray]:
    parts = ('a', 'b', 'scale', 'magnitude', 'a_start', 'b_start')
    return {part: peft.host_array(getattr(leaf, part)) for part in parts if getattr(leaf, part) is not None}


def _used_rank(a: np.ndarray, b: np.ndarray) -> int:
    """The rank of factors without what only fills them up to the stack's largest."""
    reached = np.abs(a).max(-2) + np.abs(b).max(-1)
    used = np.flatnonzero(reached.reshape(-1, reached.shape[-1]).max(0))
    return int(used[-1]) + 1 if used.size else a.shape[-1]


def _commonest(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _short_names(chosen: set[str], every: set[str]) -> list[str]:
    """The last parts of names where they mean exactly these modules, else whole names."""
    short = {name.rsplit('.', 1)[-1] for name in chosen}
    meant = {name for name in every if targets.matches(name, sorted(short))}
    return sorted(short if meant == chosen else chosen)
