"""Adapters in and out, in the folder format of Hugging Face `peft`: `adapter_config.json`, `adapter_model.safetensors`.

LoRA (with rsLoRA, DoRA and rank patterns), prompt tuning and a decoder's prefix are read and written as PEFT does; what
PEFT does not have (bottleneck adapters, prefixes of other kinds of models) goes into the same two files under this
tree's own names. Nothing pickled is read.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.common import paths
from jaxtune.common.io import replace_folder
from jaxtune.common.jsonfile import read_object
from jaxtune.errors import UserError, shown
from jaxtune.methods import METHODS, AdapterArrays, Attach, Method, peft_fields, peft_tied, peft_tokens
from jaxtune.methods.peft_experts import current
from jaxtune.models.hf import not_finite
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry, read_header, write_file
from jaxtune.weights.tree import nested

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
NAME_PREFIX = 'base_model.model.'
PROMPT_PREFIX = 'base_model.'  # of methods that wrap no module


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


def kinds(own: Method | None = None) -> dict[str, Method]:
    """PEFT's name of a kind of adapter -> the method that trains it.

    Args:
      own: a method that is not among those that are shipped.
    """
    methods = [METHODS.get(name) for name in METHODS.names] + ([own] if own else [])
    return {kind: method for method in methods for kind in method.read_adapter}


def read_config(folder: str | os.PathLike, own: Method | None = None) -> dict[str, Any]:
    """The adapter's config; `own` as for `kinds`.

    Raises:
      UserError: it is no adapter, or of a kind that is not built here.
    """
    path = pathlib.Path(folder) / CONFIG
    config = read_object(path, peft_fields.FIELDS, 'no such file; expected the config of an adapter')
    kind = config.get('peft_type')
    if kind not in (known := kinds(own)):
        raise UserError(f'{path}: peft_type={shown(kind)}: expected one of {", ".join(known)}')
    for name in peft_fields.NEEDED.get(kind, ()):
        if config.get(name) is None:
            raise UserError(f'{path}: {name}: no such field; expected it of peft_type={kind}')
    if kind == 'LORA':
        peft_fields.check_lora(path, config)
    return config


def base_of(folder: str, own: Method | None = None) -> str:
    """The model that an adapter was trained on, as its config names it; a `base/` beside it comes first."""
    beside = pathlib.Path(folder).parent / 'base'
    if (beside / 'config.json').is_file():
        return str(beside)
    base = read_config(folder, own).get('base_model_name_or_path')
    if not base:
        raise UserError(f'{folder}/{CONFIG}: names no base_model_name_or_path; expected model.path to be its base')
    return str(base)


def parts_table(folders: Iterable[str], model: Model, own: Method | None = None) -> bool:
    """Whether adapters need a model with a head of its own, where this one's is its embedding (see `peft_tied`).

    Raises:
      UserError: as `reader`, or one adapter parts them and another changes both as one.
    """
    by_change = {}
    for folder in folders if model.tie else ():
        by_change[peft_tied.change(read_config(folder, own), _entries(pathlib.Path(folder)), model)] = folder
    if {'one', 'apart'} <= set(by_change):
        raise UserError(
            f'{by_change["apart"]}: changes the embedding apart from the head, {by_change["one"]} both as one; '
            'expected them one at a time'
        )
    return 'apart' in by_change


def reader(
    folder: str, model: Model, own: Method | None = None, vocab_size: int | None = None
) -> tuple[Attach, AdapterArrays]:
    """`(init, arrays)`: `init(params, arrays)` is the tree of a base with this adapter; for `apply.attach`.

    Args:
      folder: of the adapter.
      model: with rows for all tokens.
      own: as for `kinds`.
      vocab_size: rows of the base, where that has fewer than the model.

    Raises:
      UserError: pickled weights, or an adapter of another model.
    """
    place = pathlib.Path(folder)
    config, entries = read_config(folder, own), _entries(place)
    rows, entries = peft_tokens.read(place, config, entries, model, vocab_size or model.config.vocab_size)
    entries = peft_tied.as_here(folder, config, entries, model)
    kind = config['peft_type']
    init, arrays = kinds(own)[kind].read_adapter[kind](place, config, entries, model)
    if not rows:
        return init, arrays
    ids = {path: tokens for path, (tokens, _) in rows.items()}

    def init_with_rows(params: Any, arrays: AdapterArrays) -> Any:
        return peft_tokens.put(init(params, arrays), ids, arrays.rows or {})

    return init_with_rows, arrays._replace(rows={path: values for path, (_, values) in rows.items()})


def token_ids(folder: str, own: Method | None = None) -> set[int]:
    """The tokens whose rows an adapter holds; raises as `read_config`."""
    return peft_tokens.tokens(read_config(folder, own))


def _entries(folder: pathlib.Path) -> dict[str, Entry]:
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(file.name for file in folder.glob('*.bin'))
        if pickled:
            raise UserError(
                f'{folder}: only pickled weights ({pickled[0]}), which are never loaded because they can run code; '
                f'expected {WEIGHTS}'
            )
        raise UserError(f'{folder}: expected {WEIGHTS}')
    return {name.removeprefix(NAME_PREFIX): entry for name, entry in read_header(folder / WEIGHTS).items()}


def wrong_base(folder: pathlib.Path, what: str) -> UserError:
    """What to raise for an adapter that does not fit the model."""
    return UserError(f'{folder}: an adapter for another base: {what}')


def float_values(entry: Entry) -> np.ndarray:
    """A tensor's values as float32.

    Raises:
      UserError: one of them is not finite.
    """
    values = entry.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise not_finite(entry)
    return values


def whole_leaves(folder: pathlib.Path, saved: Mapping[str, Entry], model: Model) -> dict[str, np.ndarray]:
    """Leaves of the model itself that an adapter brings along."""
    shapes, places = leaf_paths(model.shapes), _places(model)
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, entry in saved.items():
        where = places.get(name) or places.get(f'{model.base_prefix}{name}')
        if where is None:
            raise wrong_base(folder, f'it holds {name}, which this model does not have')
        path, at = where
        value = float_values(entry)
        if value.shape != model.tensors[path].shape(shapes[path].shape):
            raise wrong_base(folder, f'{name} is {list(value.shape)} in the adapter')
        found.setdefault(path, {})[at] = value.T if model.tensors[path].transposed else value
    leaves = {}
    for path, parts in found.items():
        names = model.tensors[path].names(shapes[path].shape)
        if lacking := set(range(len(names))) - set(parts):
            raise UserError(
                f'{folder}: holds {names[min(parts)]} and not {names[min(lacking)]}; expected a module whole in all '
                'layers, or in none'
            )
        leaves[path] = np.stack([parts[i] for i in sorted(parts)]).reshape(shapes[path].shape)
    return leaves


def _places(model: Model) -> dict[str, tuple[str, int]]:
    """Name of every tensor of a folder, also as `transformers` has it now -> its path and its number in the stack."""
    shapes, places = leaf_paths(model.shapes), {}
    for path, tensor in model.tensors.items():
        named = [tensor.names(shapes[path].shape, other) for other in tensor.others]
        own = tensor.names(shapes[path].shape)
        for names in (*named, [current(name, model) for name in own]):
            for i, name in enumerate(names):
                places.setdefault(name, (path, i))
        places |= {name: (path, i) for i, name in enumerate(own)}
    return places


def own_arrays(folder: pathlib.Path, entries: Mapping[str, Entry], mark: str, model: Model) -> AdapterArrays:
    """Arrays under this tree's own paths, those with `mark` in their names, and the model's leaves beside them."""
    added = {name: float_values(entry) for name, entry in entries.items() if mark in name}
    rest = {name: entry for name, entry in entries.items() if name not in added}
    return AdapterArrays(added, whole_leaves(folder, rest, model))


def put_in(params: Any, arrays: AdapterArrays) -> Any:
    """The tree of a base with added leaves, and with leaves of its own that the adapter brings along."""
    added, whole, _ = arrays
    return nested({**leaf_paths(params), **whole, **added})


def write(
    folder: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    model: Model,
    base: str,
    readme: str = '',
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
    if readme:
        (partial / 'README.md').write_text(readme, 'utf-8')
    arrays = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    write_file(partial / WEIGHTS, {n: (v.dtype, v.shape) for n, v in arrays.items()}, iter(arrays.values()))
    replace_folder(partial, folder)


def _task_type(model: Model) -> str | None:
    if model.architecture.endswith('ForSequenceClassification'):
        return 'SEQ_CLS'
    if model.architecture.endswith('ForTokenClassification'):
        return 'TOKEN_CLS'
    return {'decoder': 'CAUSAL_LM', 'encdec': 'SEQ_2_SEQ_LM'}.get(model.kind)


def whole_tensors(
    leaves: Mapping[str, Any], whole: Iterable[str], model: Model, prefix: str = NAME_PREFIX
) -> dict[str, np.ndarray]:
    """Tensors of leaves that were trained whole, by PEFT's names."""
    tensors = {}
    for path in whole:
        value, tensor = host_array(leaves[path]), model.tensors[path]
        names, shape = tensor.names(value.shape), tensor.shape(value.shape)
        stack = value.reshape(-1, *value.shape[tensor.stacked :])
        for name, one in zip(names, stack, strict=True):
            module, _, part = name.rpartition('.')
            for place in peft_tied.places(model, path, module):
                owned = one.T if tensor.transposed else one
                tensors[f'{prefix}{current(place.name, model)}.{part}'] = owned.reshape(shape)
    return tensors


def token_rows(leaves: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of the config about new rows of tokens, and the tensors of these rows by PEFT's names."""
    fields, rows = peft_tokens.fields_and_rows(leaves, model)
    return fields, {NAME_PREFIX + name: host_array(leaf) for name, leaf in rows.items()}


def modules_to_save(tensors: Mapping[str, Any], prefix: str = NAME_PREFIX) -> list[str]:
    """Modules that PEFT must keep whole: `classifier` for all that is in it."""
    names = {name.removeprefix(prefix).rsplit('.', 1)[0] for name in tensors}
    return sorted({'classifier' if name.startswith('classifier') else name for name in names})


def host_array(leaf: jax.Array) -> np.ndarray:
    """An array's values in this process's memory, float32, gathered from all processes where it is divided."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils  # only pods need it

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf).astype(np.float32)
