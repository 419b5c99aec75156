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
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry
from jaxtune.weights import LoRA
from jaxtune.weights.tree import nested


def read(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[Attach, AdapterArrays]:
    """Reads an adapter of `peft_type=LORA`; see `peft.reader`."""
    every = targets.modules(model)
    places = {name: (path, i) for path, stack in every.items() for i, name in enumerate(stack)}
    parts: dict[str, dict[int, dict[str, np.ndarray]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
    saved = {}
    for name, entry in entries.items():
        match = re.fullmatch(r'(.*)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(\.weight)?', name)
        if not match:
            if '.base_layer.' not in name:  # an embedding's own rows, which PEFT writes beside its factors
                saved[name] = entry
            continue
        module, part = match[1], match[2].replace('embedding_', '')
        if module not in places:
            raise peft.wrong_base(folder, f'it changes {module}, which this model does not have')
        path, i = places[module]
        value = peft.float_values(entry)
        parts[path][i][part] = value if part.endswith('vector') else value.T  # [in, rank] and [rank, out]
    shapes = leaf_paths(model.shapes)
    arrays, layers, starts = {}, {}, {}
    for path, stack in parts.items():
        shape, numbers = shapes[path].shape, tuple(sorted(stack))
        names = every[path]
        layer_parts = [stack[i] for i in numbers]
        for i, part in zip(numbers, layer_parts, strict=True):
            if (
                not {'lora_A', 'lora_B'} <= set(part)
                or (part['lora_A'].shape[0], part['lora_B'].shape[1]) != shape[-2:]
            ):
                sizes = {name: list(value.shape[::-1]) for name, value in part.items()}
                raise peft.wrong_base(folder, f'{names[i]} is {shape[-2]} x {shape[-1]} here, in the adapter {sizes}')
        ranks = [part['lora_A'].shape[1] for part in layer_parts]
        rank = max(ranks)
        fill = lambda part, rank=rank: (  # noqa: E731
            np.pad(part['lora_A'], ((0, 0), (0, rank - part['lora_A'].shape[1]))),
            np.pad(part['lora_B'], ((0, rank - part['lora_B'].shape[0]), (0, 0))),
        )
        a, b = (np.stack(values) for values in zip(*(fill(part) for part in layer_parts), strict=True))
        scale = np.asarray([_scale(config, names[i], r) for i, r in zip(numbers, ranks, strict=True)], np.float32)
        leaf = {'a': a, 'b': b, 'scale': scale}
        start = config.get('init_lora_weights')
        if start in ('pissa', 'olora') and not path.endswith('embedding'):
            starts[path] = start
        if config.get('use_dora') and path.endswith('embedding'):
            raise UserError(f'{folder / peft.CONFIG}: use_dora=true: not in this version for {names[0]}, an embedding')
        if config.get('use_dora'):
            lacking = next((names[i] for i, part in zip(numbers, layer_parts, strict=True) if len(part) < 3), None)
            if lacking:
                raise UserError(f'{folder}/{peft.WEIGHTS}: use_dora=true, but {lacking} has no lora_magnitude_vector')
            leaf['magnitude'] = np.stack([part['lora_magnitude_vector'] for part in layer_parts])
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


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config['lora_alpha']
    for pattern, value in (config.get('alpha_pattern') or {}).items():
        with parsing(f'{peft.CONFIG}: alpha_pattern: {shown(pattern)}'):
            matched = re.fullmatch(rf'(.*\.)?({pattern})', name)
        if matched:
            alpha = value
            break
    return alpha / (rank**0.5 if config.get('use_rslora') else rank)


def save(
    folder: pathlib.Path, params: Any, model: Model, settings: Settings, base: str, whole: Iterable[str] = ()
) -> None:
    """Writes a tree's LoRA leaves as PEFT's LoRA.

    Args:
      folder: the folder; an older one is replaced.
      params: the tree.
      model: the model.
      settings: the recipe's `method`.
      base: name or path of the base.
      whole: paths of further leaves that were trained whole.
    """
    leaves, tensors, ranks, alphas = leaf_paths(params), {}, {}, {}
    every = targets.modules(model)
    named = {name for stack in every.values() for name in stack}
    dora = rslora = False
    for path, leaf in leaves.items():
        if not isinstance(leaf, LoRA):
            continue
        leaf = _on_host(leaf)
        stacked = model.tensors[path].stacked
        numbers = leaf['layers'] or range(len(every[path]))
        dora, rslora = 'magnitude' in leaf, bool(settings.rslora)
        embedding = path.endswith('embedding')
        for row, number in enumerate(numbers):
            name = every[path][number]
            a, b, scale = (leaf[part][row] if stacked else leaf[part] for part in ('a', 'b', 'scale'))
            rank = _used_rank(a, b)
            a, b = a[:, :rank], b[:rank]
            if 'a_start' in leaf:
                start = [leaf[part][row] if stacked else leaf[part] for part in ('a_start', 'b_start')]
                a, b = np.concatenate([a, start[0][:, :rank]], 1), np.concatenate([b, -start[1][:rank]], 0)
            for place in peft_tied.places(model, path, name):
                ranks[place.name] = a.shape[1]
                alphas[place.name] = float(scale) * (a.shape[1] ** 0.5 if rslora else a.shape[1])
                looked_up = embedding and not place.flipped
                marks = ('lora_embedding_A', 'lora_embedding_B') if looked_up else ('lora_A.weight', 'lora_B.weight')
                pair = (b, a) if place.flipped else (a.T, b.T)
                tensors |= {f'{peft.NAME_PREFIX}{place.name}.{mark}': x for mark, x in zip(marks, pair, strict=True)}
            if dora:
                magnitude = leaf['magnitude'][row] if stacked else leaf['magnitude']
                tensors[f'{peft.NAME_PREFIX}{name}.lora_magnitude_vector'] = magnitude
    rank, alpha = _commonest(ranks), _commonest(alphas)
    saved = peft.whole_tensors(leaves, whole, model)
    fields = {
        'peft_type': 'LORA',
        'r': rank,
        'lora_alpha': alpha,
        'lora_dropout': float(settings.dropout),
        'target_modules': _short_names(set(ranks), named | set(ranks)),
        'rank_pattern': {re.escape(name): value for name, value in ranks.items() if value != rank},
        'alpha_pattern': {re.escape(name): value for name, value in alphas.items() if value != alpha},
        'use_rslora': rslora,
        'use_dora': dora,
        'bias': 'none',
        'fan_in_fan_out': model.hf_config['model_type'] == 'gpt2',
        'init_lora_weights': True,
        'modules_to_save': peft.modules_to_save(saved) or None,
    }
    changed = model.tie and (isinstance(leaves[model.tie.table], LoRA) or model.tie.table in set(whole))
    fields['ensure_weight_tying'] = bool(changed and peft_tied.ensures(model))
    token_fields, rows = peft.token_rows(leaves, model)
    readme = peft_tokens.readme(leaves, model, base)
    peft.write(folder, fields | token_fields, tensors | saved | rows, model, base, readme)


def _on_host(leaf: LoRA) -> dict[str, Any]:
    parts = ('a', 'b', 'scale', 'magnitude', 'a_start', 'b_start')
    arrays = {part: peft.host_array(getattr(leaf, part)) for part in parts if getattr(leaf, part) is not None}
    return arrays | {'layers': leaf.layers}


def _used_rank(a: np.ndarray, b: np.ndarray) -> int:
    """The rank of factors without what only fills them up to the stack's largest."""
    used = np.flatnonzero(np.abs(a).max(0) + np.abs(b).max(1))
    return int(used[-1]) + 1 if used.size else a.shape[1]


def _commonest(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _short_names(chosen: set[str], every: set[str]) -> list[str]:
    """The last parts of names where they mean exactly these modules, else whole names."""
    short = {name.rsplit('.', 1)[-1] for name in chosen}
    meant = {name for name in every if targets.matches(name, sorted(short))}
    return sorted(short if meant == chosen else chosen)
