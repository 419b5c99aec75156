"""Adapters in and out, in the folder format of Hugging Face `peft`: `adapter_config.json`, `adapter_model.safetensors`.

LoRA (with rsLoRA, DoRA and rank patterns), prompt tuning and a decoder's prefix are read and written as PEFT does; what
PEFT does not have (bottleneck adapters, prefixes of other kinds of models) goes into the same two files under this
tree's own names. Nothing pickled is read.
"""

import collections
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxtune.common import paths
from jaxtune.common.io import replace_folder
from jaxtune.common.jsonfile import read_object
from jaxtune.errors import UserError, parsing, shown
from jaxtune.methods import lora, peft_fields, peft_tied, targets
from jaxtune.models.hf import not_finite
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry, read_header, write_file
from jaxtune.weights import LoRA
from jaxtune.weights.tree import nested

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
BOTTLENECK, PREFIX = 'JAXTUNE_BOTTLENECK', 'JAXTUNE_PREFIX'
# PEFT's name of a kind of adapter -> the method that trains it here.
METHODS = {
    'LORA': 'lora', 'PROMPT_TUNING': 'prompt', 'PREFIX_TUNING': 'prompt', BOTTLENECK: 'adapter', PREFIX: 'prompt',
}  # fmt: skip
_PREFIX = 'base_model.model.'


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter."""
    return (pathlib.Path(folder) / CONFIG).is_file()


def find(path: str) -> str:
    """The adapter folder that `method.path` means: itself, or the `adapter/` of a workdir.

    Raises:
      UserError: neither.
    """
    folder = paths.local(path, 'method.path')
    for candidate in (folder, folder / 'adapter'):
        if is_adapter(candidate):
            return str(candidate)
    raise UserError(f'method.path={path}: expected a folder with {CONFIG}, or a workdir with adapter/{CONFIG}')


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The adapter's config.

    Raises:
      UserError: it is no adapter, or of a kind that is not built here.
    """
    path = pathlib.Path(folder) / CONFIG
    config = read_object(path, peft_fields.FIELDS, 'no such file; expected the config of an adapter')
    kind = config.get('peft_type')
    if kind not in METHODS:
        raise UserError(f'{path}: peft_type={shown(kind)}: expected one of {", ".join(METHODS)}')
    for name in peft_fields.NEEDED.get(kind, ()):
        if config.get(name) is None:
            raise UserError(f'{path}: {name}: no such field; expected it of peft_type={kind}')
    if kind == 'LORA':
        peft_fields.check_lora(path, config)
    return config


def base_of(folder: str) -> str:
    """The model that an adapter was trained on, as its config names it; a `base/` beside it comes first."""
    beside = pathlib.Path(folder).parent / 'base'
    if (beside / 'config.json').is_file():
        return str(beside)
    base = read_config(folder).get('base_model_name_or_path')
    if not base:
        raise UserError(f'{folder}/{CONFIG}: names no base_model_name_or_path; expected model.path to be its base')
    return str(base)


class Arrays(NamedTuple):
    """An adapter's numbers: what it adds, by path, and the model's own leaves that it brings along whole."""

    added: Mapping[str, Any]
    whole: Mapping[str, np.ndarray]


def parts_table(folders: Iterable[str], model: Model) -> bool:
    """Whether adapters need a model with a head of its own, where this one's is its embedding (see `peft_tied`).

    Raises:
      UserError: as `reader`, or one adapter parts them and another changes both as one.
    """
    found = {}
    for folder in folders if model.tie else ():
        found[peft_tied.change(read_config(folder), _entries(pathlib.Path(folder)), model)] = folder
    if {'one', 'apart'} <= set(found):
        raise UserError(
            f'{found["apart"]}: changes the embedding apart from the head, {found["one"]} both as one; expected them '
            'one at a time'
        )
    return 'apart' in found


def reader(folder: str, model: Model) -> tuple[Callable[..., Any], Arrays]:
    """`(init, arrays)`: `init(params, arrays)` is the tree of a base with this adapter; for `tuning.attach`.

    Raises:
      UserError: pickled weights, or an adapter of another model.
    """
    config, entries = read_config(folder), _entries(pathlib.Path(folder))
    entries = peft_tied.as_here(folder, config, entries, model)
    readers = {'LORA': _read_lora, 'PROMPT_TUNING': _read_prompt, 'PREFIX_TUNING': _read_prefix}
    read = readers.get(config['peft_type'], _read_own)
    return read(pathlib.Path(folder), config, entries, model)


def _entries(folder: pathlib.Path) -> dict[str, Entry]:
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(file.name for file in folder.glob('*.bin'))
        if pickled:
            raise UserError(
                f'{folder}: only pickled weights ({pickled[0]}), which are never loaded because they can run code; '
                f'expected {WEIGHTS}'
            )
        raise UserError(f'{folder}: expected {WEIGHTS}')
    return {name.removeprefix(_PREFIX): entry for name, entry in read_header(folder / WEIGHTS).items()}


def _wrong_base(folder: pathlib.Path, what: str) -> UserError:
    return UserError(f'{folder}: an adapter for another base: {what}')


def _float(entry: Entry) -> np.ndarray:
    """A tensor's values as float32.

    Raises:
      UserError: one of them is not finite.
    """
    values = entry.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise not_finite(entry)
    return values


def _read_lora(folder, config, entries, model: Model):
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
            raise _wrong_base(folder, f'it changes {module}, which this model does not have')
        path, i = places[module]
        value = _float(entry)
        parts[path][i][part] = value if part.endswith('vector') else value.T  # [in, rank] and [rank, out]
    shapes = leaf_paths(model.shapes)
    arrays, layers, starts = {}, {}, {}
    for path, stack in parts.items():
        shape, numbers = shapes[path].shape, tuple(sorted(stack))
        names = every[path]
        found = [stack[i] for i in numbers]
        for i, part in zip(numbers, found, strict=True):
            if (
                not {'lora_A', 'lora_B'} <= set(part)
                or (part['lora_A'].shape[0], part['lora_B'].shape[1]) != shape[-2:]
            ):
                sizes = {name: list(value.shape[::-1]) for name, value in part.items()}
                raise _wrong_base(folder, f'{names[i]} is {shape[-2]} x {shape[-1]} here, in the adapter {sizes}')
        ranks = [part['lora_A'].shape[1] for part in found]
        rank = max(ranks)
        fill = lambda part, rank=rank: (  # noqa: E731
            np.pad(part['lora_A'], ((0, 0), (0, rank - part['lora_A'].shape[1]))),
            np.pad(part['lora_B'], ((0, rank - part['lora_B'].shape[0]), (0, 0))),
        )
        a, b = (np.stack(values) for values in zip(*(fill(part) for part in found), strict=True))
        scale = np.asarray([_scale(config, names[i], r) for i, r in zip(numbers, ranks, strict=True)], np.float32)
        leaf = {'a': a, 'b': b, 'scale': scale}
        start = config.get('init_lora_weights')
        if start in ('pissa', 'olora') and not path.endswith('embedding'):
            starts[path] = start
        if config.get('use_dora') and path.endswith('embedding'):
            raise UserError(f'{folder / CONFIG}: use_dora=true: not in this version for {names[0]}, an embedding')
        if config.get('use_dora'):
            lacking = next((names[i] for i, part in zip(numbers, found, strict=True) if len(part) < 3), None)
            if lacking:
                raise UserError(f'{folder}/{WEIGHTS}: use_dora=true, but {lacking} has no lora_magnitude_vector')
            leaf['magnitude'] = np.stack([part['lora_magnitude_vector'] for part in found])
        stacked = len(shape) > 2
        arrays[path] = leaf if stacked else {name: value[0] for name, value in leaf.items()}
        layers[path] = numbers if stacked and len(numbers) < shape[0] else None
    whole = _whole(folder, saved, model)
    dropout = float(config.get('lora_dropout') or 0.0)

    def init(params, arrays):
        factors, whole = arrays
        leaves = leaf_paths(params) | whole
        for path, leaf in factors.items():
            made = LoRA(leaves[path], dropout=dropout, layers=layers[path], **leaf)
            leaves[path] = lora.begun(made, starts[path]) if path in starts else made
        return nested(leaves)

    return init, Arrays(arrays, whole)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config['lora_alpha']
    for pattern, value in (config.get('alpha_pattern') or {}).items():
        with parsing(f'{CONFIG}: alpha_pattern: {shown(pattern)}'):
            matched = re.fullmatch(rf'(.*\.)?({pattern})', name)
        if matched:
            alpha = value
            break
    return alpha / (rank**0.5 if config.get('use_rslora') else rank)


def _whole(folder, saved: Mapping[str, Entry], model: Model) -> dict[str, np.ndarray]:
    """Leaves of the model itself that an adapter brings along."""
    single = {path: tensor for path, tensor in model.tensors.items() if not tensor.stacked}
    names = {name: path for path, tensor in single.items() for name in (*tensor.others, tensor.name)}
    names |= {tensor.name: path for path, tensor in single.items()}
    found = {}
    for name, entry in saved.items():
        path = names.get(name)
        if path is None:
            raise _wrong_base(folder, f'it holds {name}, which this model does not have')
        value = _float(entry)
        found[path] = value.T if model.tensors[path].transposed else value
        if found[path].shape != leaf_paths(model.shapes)[path].shape:
            raise _wrong_base(folder, f'{name} is {list(value.shape)} in the adapter')
    return found


def _read_prompt(folder, config, entries, model: Model):
    prompt, whole = _prompt_embeddings(folder, entries, model)
    if prompt.shape[1] != model.config.d_model:
        raise _wrong_base(
            folder, f'its tokens have {prompt.shape[1]} dimensions, this model has {model.config.d_model}'
        )
    prompt = prompt[: config['num_virtual_tokens']]  # PEFT's own for an encoder-decoder has the decoder's too
    return _put_in, Arrays({'prompt/embedding': prompt}, whole)


def _read_prefix(folder, config, entries, model: Model):
    if model.kind != 'decoder':
        raise _wrong_base(folder, f"PEFT's prefix tuning is read for decoders, and this model is an {model.kind}")
    flat, whole = _prompt_embeddings(folder, entries, model)
    c = model.config
    shape = (c.num_layers, 2, c.num_kv_heads, c.head_dim)
    if flat.shape[1] != np.prod(shape):
        raise _wrong_base(
            folder, f'its keys and values are {flat.shape[1]} numbers a token, this model has {np.prod(shape)}'
        )
    k, v = flat.reshape(-1, *shape).transpose(2, 1, 0, 3, 4)  # each [layers, virtual, kv_heads, head_dim]
    return _put_in, Arrays({'layers/self_attn/prefix/k': k, 'layers/self_attn/prefix/v': v}, whole)


def _prompt_embeddings(folder, entries, model: Model) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What PEFT's prompt methods store, `[virtual, ...]`, and the leaves of the model beside it."""
    rest = dict(entries)
    if 'prompt_embeddings' not in rest:
        raise UserError(f'{folder}/{WEIGHTS}: expected prompt_embeddings')
    return _float(rest.pop('prompt_embeddings')), _whole(folder, rest, model)


def _put_in(params, arrays):
    """The tree of a base with added leaves, and with leaves of its own that the adapter brings along."""
    added, whole = arrays
    return nested(leaf_paths(params) | whole | added)


def _read_own(folder, config, entries, model: Model):
    mark, fits = ('_adapter/', _bottlenecks_fit) if config['peft_type'] == BOTTLENECK else ('/prefix/', _prefixes_fit)
    ours = {key: _float(entry) for key, entry in entries.items() if mark in key}
    whole = _whole(folder, {name: entry for name, entry in entries.items() if name not in ours}, model)
    fits(folder, ours, model)
    return _put_in, Arrays(ours, whole)


def _prefixes_fit(folder, ours: Mapping[str, np.ndarray], model: Model) -> None:
    shapes = leaf_paths(model.shapes)
    for path, value in ours.items():
        kernel = shapes.get(path.rsplit('/', 2)[0] + '/o_proj/kernel')
        if kernel is None or (*value.shape[:-3], value.shape[-2] * value.shape[-1]) != kernel.shape[:-1]:
            raise _wrong_base(folder, f'{path} {list(value.shape)} does not fit its attention layer')


def _bottlenecks_fit(folder, ours: Mapping[str, np.ndarray], model: Model) -> None:
    stacks = {path.rsplit('/', 3)[0] for path in ours}
    shapes = leaf_paths(model.shapes)
    for path, value in ours.items():
        stack = path.rsplit('/', 3)[0]
        kernel = shapes.get(f'{stack}/mlp/down_proj/kernel')
        width = value.shape[-2 if path.endswith('down/kernel') else -1] if 'down/bias' not in path else None
        if (
            kernel is None
            or value.shape[: len(kernel.shape) - 2] != kernel.shape[:-2]
            or (width is not None and width != kernel.shape[-1])
        ):
            raise _wrong_base(folder, f'{path} {list(value.shape)} does not fit; this model has {sorted(stacks)}')


def save_lora(
    folder: pathlib.Path, params: Any, model: Model, config: ConfigDict, base: str, whole: Iterable[str] = ()
) -> None:
    """Writes a tree's LoRA leaves as PEFT's LoRA.

    Args:
      folder: the folder; an older one is replaced.
      params: the tree.
      model: the model.
      config: the recipe's `method`.
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
        dora, rslora = 'magnitude' in leaf, bool(config.rslora)
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
                tensors |= {f'{_PREFIX}{place.name}.{mark}': x for mark, x in zip(marks, pair, strict=True)}
            if dora:
                magnitude = leaf['magnitude'][row] if stacked else leaf['magnitude']
                tensors[f'{_PREFIX}{name}.lora_magnitude_vector'] = magnitude
    rank, alpha = _commonest(ranks), _commonest(alphas)
    kept = _whole_tensors(leaves, whole, model)
    fields = {
        'peft_type': 'LORA',
        'r': rank,
        'lora_alpha': alpha,
        'lora_dropout': float(config.dropout),
        'target_modules': _short_names(set(ranks), named | set(ranks)),
        'rank_pattern': {re.escape(name): value for name, value in ranks.items() if value != rank},
        'alpha_pattern': {re.escape(name): value for name, value in alphas.items() if value != alpha},
        'use_rslora': rslora,
        'use_dora': dora,
        'bias': 'none',
        'fan_in_fan_out': model.hf_config['model_type'] == 'gpt2',
        'init_lora_weights': True,
        'modules_to_save': _modules_to_save(kept) or None,
    }
    changed = model.tie and (isinstance(leaves[model.tie.table], LoRA) or model.tie.table in set(whole))
    fields['ensure_weight_tying'] = bool(changed and peft_tied.ensures(model))
    write(folder, fields, tensors | kept, model, base)


def write(
    folder: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: Model, base: str
) -> None:
    """Writes an adapter folder; an older one is replaced at the end, in one step. In process 0 alone."""
    if jax.process_index():
        return
    folder = pathlib.Path(folder)
    partial = folder.with_name(f'.{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {
        **fields,
        'base_model_name_or_path': os.path.abspath(base) if os.path.isdir(base) else base,
        'inference_mode': True,
        'task_type': _task_type(model),
    }
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + '\n', 'utf-8')
    arrays = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    write_file(partial / WEIGHTS, {n: (v.dtype, v.shape) for n, v in arrays.items()}, iter(arrays.values()))
    replace_folder(partial, folder)


def _task_type(model: Model) -> str | None:
    if model.architecture.endswith('ForSequenceClassification'):
        return 'SEQ_CLS'
    if model.architecture.endswith('ForTokenClassification'):
        return 'TOKEN_CLS'
    return {'decoder': 'CAUSAL_LM', 'encdec': 'SEQ_2_SEQ_LM'}.get(model.kind)


def save_prompt(folder, params, model: Model, config: ConfigDict, base: str, whole: Iterable[str] = ()) -> None:
    """Writes a tree's prompt as PEFT's prompt tuning, or its prefixes; arguments as for `save_lora`."""
    leaves = leaf_paths(params)
    kept = _whole_tensors(leaves, whole, model)
    fields = {'num_transformer_submodules': 1, 'modules_to_save': _modules_to_save(kept) or None}
    if 'prompt/embedding' in leaves:
        prompt = host_array(leaves['prompt/embedding'])
        fields |= {'peft_type': 'PROMPT_TUNING', 'prompt_tuning_init': 'RANDOM', 'token_dim': prompt.shape[1]}
        fields['num_attention_heads'] = model.config.num_heads
        fields['num_layers'] = getattr(model.config, 'num_decoder_layers', model.config.num_layers)
    elif model.kind == 'decoder':
        both = np.stack([host_array(leaves[f'layers/self_attn/prefix/{name}']) for name in ('k', 'v')])
        _, layers, count, heads, head_dim = both.shape
        prompt = both.transpose(2, 1, 0, 3, 4).reshape(count, -1)
        fields |= {'peft_type': 'PREFIX_TUNING', 'prefix_projection': False, 'token_dim': heads * head_dim}
        fields |= {'num_attention_heads': heads, 'num_layers': layers}
    else:
        ours = {path: host_array(leaf) for path, leaf in leaves.items() if '/prefix/' in path}
        write(folder, {'peft_type': PREFIX}, ours | kept, model, base)
        return
    fields['num_virtual_tokens'] = prompt.shape[0]
    write(folder, fields, {'prompt_embeddings': prompt} | kept, model, base)


def save_bottleneck(folder, params, model: Model, config: ConfigDict, base: str, whole: Iterable[str] = ()) -> None:
    """Writes a tree's bottleneck adapters under their paths; arguments as for `save_lora`."""
    leaves = leaf_paths(params)
    ours = {path: host_array(leaf) for path, leaf in leaves.items() if '_adapter/' in path}
    kept = _whole_tensors(leaves, whole, model)
    fields = {'peft_type': BOTTLENECK, 'bottleneck': config.bottleneck, 'placement': config.placement}
    write(folder, fields, ours | kept, model, base)


def _whole_tensors(leaves: Mapping[str, Any], whole: Iterable[str], model: Model) -> dict[str, np.ndarray]:
    found = {}
    for path in whole:
        value, tensor = host_array(leaves[path]), model.tensors[path]
        for place in peft_tied.places(model, path, tensor.name.rpartition('.')[0]):
            name = f'{place.name}.{tensor.name.rpartition(".")[2]}'
            found[_PREFIX + name] = value.T if tensor.transposed else value
    return found


def _modules_to_save(tensors: Mapping[str, Any]) -> list[str]:
    """Modules that PEFT must keep whole: `classifier` for all that is in it."""
    names = {name.removeprefix(_PREFIX).rsplit('.', 1)[0] for name in tensors}
    return sorted({'classifier' if name.startswith('classifier') else name for name in names})


def host_array(leaf: jax.Array) -> np.ndarray:
    """An array's values in this process's memory, float32, gathered from all processes where it is divided."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf).astype(np.float32)


def _on_host(leaf: LoRA) -> dict[str, Any]:
    parts = ('a', 'b', 'scale', 'magnitude', 'a_start', 'b_start')
    arrays = {part: host_array(getattr(leaf, part)) for part in parts if getattr(leaf, part) is not None}
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
