"""Hugging Face folders in and out: safetensors tensor by tensor, each straight to its devices and dtype.

Which tensor of a folder is which leaf of the tree, a family says: `models.model.Tensor`, made by `_tensors` of each
kind of model from the names in its table of families (`decoder_families` and its kin).

Nothing that a folder holds is unpickled or executed: pickled weights are refused and code is ignored.
"""

import collections
import fnmatch
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common import console, hub, paths
from jaxtune.common.io import replace_folder
from jaxtune.common.jsonfile import read_object
from jaxtune.errors import UserError, shown
from jaxtune.models.fields import config_json
from jaxtune.models.model import Model, Params, Tensor, leaf_paths
from jaxtune.models.mxfp4 import joined
from jaxtune.models.safetensors import Entry, read_header, write_file
from jaxtune.weights import NF4, Codec
from jaxtune.weights.tree import nested

_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_PICKLED = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl', '*.msgpack', '*.h5')
_PART_BYTES = 2**27  # of a tensor, on its way from the file to a device
_SHARD_BYTES = 5_000_000_000


def load(
    path: str | os.PathLike,
    model: Model,
    shardings: Params | None = None,
    rng: jax.Array | None = None,
    codecs: Mapping[str, Codec] | None = None,
) -> tuple[Params, set[str]]:
    """Reads a model's parameters, in the model's own dtypes. Every process reads only what its own devices hold.

    Args:
      path: a folder or hub id with `model.safetensors` or its sharded index.
      model: the model of that folder's `config.json`.
      shardings: tree of shardings like the parameters'; None = all on the first device.
      rng: key for parameters that the folder lacks.
      codecs: paths of kernels that become typed leaves, layer by layer while they are read -> how.

    Returns:
      `(params, newly_initialized)`: the tree, and the paths of heads that the folder lacks and that were initialised
      instead.

    Raises:
      UserError: no such folder, no safetensors, only pickled weights, a truncated file, tensors that are missing,
        unknown, of another shape, or not finite.
    """
    folder = hub.resolve(os.fspath(path))
    sources, newly_initialized = _match(model, _entries(folder), folder)
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    codecs, shapes = codecs or {}, leaf_paths(model.shapes)
    placed = dict.fromkeys(shapes, one_device) if shardings is None else leaf_paths(shardings)

    # In the files' own order, which a disk or a network reads fastest.
    order = sorted(
        (str(entry.path), entry.offset, leaf, i) for leaf in sources for i, entry in enumerate(sources[leaf])
    )
    leaves: dict[str, Any] = {}  # arrays and typed leaves
    pending: tuple[Entry, tuple[Any, jax.Array]] | None = None
    for _, _, leaf, number in order:
        tensor, sharding, shape = model.tensors[leaf], placed[leaf], shapes[leaf].shape
        at = np.unravel_index(number, shape[: tensor.stacked]) if tensor.stacked else ()
        if leaf in codecs:
            codec = codecs[leaf]
            if leaf not in leaves:
                leaves[leaf] = _empty_encoded(codec, shape, sharding)
            _wait(pending)
            entry = sources[leaf][number]
            matrix = _on_devices(entry, 0, entry.shape, _replicated(sharding))
            written = _put_encoded(codec, tensor, sharding)(leaves[leaf], matrix, at)
            leaves[leaf], pending = written[0], (entry, written)
            continue
        if leaf not in leaves:
            leaves[leaf] = _empty(shape, shapes[leaf].dtype, sharding)
        spread = _part_sharding(tensor, sharding, len(shape))
        for part, start in _parts(sources[leaf][number], spread):
            _wait(pending)  # two parts at most are on their way: one read, one written
            written = _put(tensor, sharding, start is not None)(leaves[leaf], part, at, start or 0)
            leaves[leaf], pending = written[0], (sources[leaf][number], written)
    _wait(pending)
    if newly_initialized:
        key = jax.random.key(0) if rng is None else rng
        make = jax.jit(
            lambda key: {leaf: leaf_paths(model.init(key))[leaf] for leaf in sorted(newly_initialized)},
            out_shardings={leaf: placed[leaf] for leaf in sorted(newly_initialized)},
        )
        leaves |= make(key)
    return nested({leaf: leaves[leaf] for leaf in shapes}), newly_initialized


def save(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    add_files: Callable[[pathlib.Path], Any] | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads; an older one at `path` is replaced at the end, in one step.

    With several processes all call it, and the first one writes.

    Args:
      path: the folder.
      model: the model.
      params: its parameters, plain arrays.
      add_files: writes more files into the folder before it takes its place.
      dtypes: what parameters become, by path; default as they are.
      max_shard_bytes: beyond this the weights are cut into several files with an index.
    """
    path = pathlib.Path(path)
    leaves = leaf_paths(params)
    if set(leaves) != set(model.tensors):
        raise ValueError(
            f'expected exactly the parameters of the model, not {sorted(set(leaves) ^ set(model.tensors))}'
        )
    writes = jax.process_index() == 0
    partial = path.with_name(f'.{path.name}.partial')
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    plan = list(_plan(model, leaves, dtypes or {}))
    files = _cut(plan, max_shard_bytes)
    for name, tensors in files.items():
        specs = {entry.name: (entry.dtype, entry.shape) for entry in tensors}
        values = (_fetch(entry, writes) for entry in tensors)
        if writes:
            write_file(partial / name, specs, cast(Iterator[np.ndarray], values))  # here none is None
        else:
            collections.deque(values, maxlen=0)
    if writes:
        if len(files) > 1:
            weight_map = {entry.name: name for name, tensors in files.items() for entry in tensors}
            index = {'metadata': {'total_size': sum(entry.nbytes for entry in plan)}, 'weight_map': weight_map}
            (partial / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n', 'utf-8')
        _write_configs(partial, model, str(max(plan, key=lambda entry: entry.nbytes).dtype))
        if add_files is not None:
            add_files(partial)
        replace_folder(partial, path)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # only pods need it

        multihost_utils.sync_global_devices(f'saved {path}')


def newly_initialized_paths(path: str | os.PathLike, model: Model) -> set[str]:
    """Paths of the heads that a folder lacks; only headers are read. Raises as `load` does.

    Notes how many tensors of the folder are not used, such as those of a vision tower.
    """
    folder = hub.resolve(os.fspath(path))
    entries = _entries(folder)
    sources, missing = _match(model, entries, folder)
    if unused := _unused(model, entries, sources):
        console.note(f'{folder}: {len(unused):,} tensors are not used, such as {unused[0]}')
    return missing


def stored_dtypes(path: str | os.PathLike, model: Model) -> dict[str, np.dtype]:
    """What a folder keeps each parameter in; one that it lacks, in what the others are. Raises as `load` does.

    The model may have more rows for tokens than the folder.
    """
    folder = hub.resolve(os.fspath(path))
    sources, newly_initialized = _match(model, _entries(folder), folder, shaped=False)
    dtypes = {leaf: entries[0].dtype for leaf, entries in sources.items()}
    return dict.fromkeys(newly_initialized, collections.Counter(dtypes.values()).most_common(1)[0][0]) | dtypes


def has_own_head(path: str | os.PathLike, model: Model) -> bool:
    """Whether a folder holds a head that is not the embedding, which its config.json says it is. Raises as `load` does.

    `transformers` believes the tensors.
    """
    if model.tie is None:
        return False
    folder = hub.resolve(os.fspath(path))
    entries = _entries(folder)
    (table,), head = (
        _match(model, entries, folder)[0][model.tie.table],
        entries.get(_stored(model.tie.name, model, entries)),
    )
    if head is None or head is table:
        return False
    rows = max(1, _PART_BYTES // (8 * head.shape[-1]))
    parts = (slice(low, low + rows) for low in range(0, head.shape[0], rows))
    return head.shape != table.shape or not all(np.array_equal(head.read((p,)), table.read((p,))) for p in parts)


def kernels(path: str | os.PathLike, model: Model) -> Callable[[str, int], np.ndarray]:
    """A function that reads one kernel `[in, out]` of a folder, by its path and its number in the flattened stack."""
    folder = hub.resolve(os.fspath(path))
    sources, _ = _match(model, _entries(folder), folder)

    def read(leaf: str, number: int) -> np.ndarray:
        inside = math.prod(sources[leaf][0].shape[:-2])  # matrices of one tensor
        entry = sources[leaf][number // inside]
        values = entry.read((slice(number % inside, number % inside + 1),) if len(entry.shape) > 2 else ())
        matrix = values.reshape(entry.shape[-2:]).astype(np.float32)
        return matrix.T if model.tensors[leaf].transposed else matrix

    return read


def _entries(folder: pathlib.Path) -> dict[str, Entry]:
    """All tensors of a folder by name."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        names = [_SINGLE]
    elif index.is_file():
        weight_map = read_object(index).get('weight_map')
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f'{index}: expected a weight_map, the file of each tensor by its name')
        names = sorted(set(weight_map.values()))
    else:
        names = sorted(file.name for file in folder.glob('*.safetensors'))
    if not names:
        pickled = sorted(file.name for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in _PICKLED))
        if pickled:
            raise UserError(
                f'{folder}: only pickled weights ({pickled[0]}), which are never loaded because they can run code; '
                'expected model.safetensors'
            )
        raise UserError(f'{folder}: no model.safetensors and no {_INDEX}')
    entries: dict[str, Entry] = {}
    for name in names:
        if name != os.path.basename(name) or paths.wrong(folder / name) or not (folder / name).is_file():
            raise UserError(f'{folder}: the file {shown(name)} that {_INDEX} names is missing')
        entries |= read_header(folder / name)
    return joined(entries)


def _match(
    model: Model, entries: Mapping[str, Entry], folder: pathlib.Path, shaped: bool = True
) -> tuple[dict[str, list[Entry]], set[str]]:
    """Which tensors make which parameter: one, or one a layer; of the very shapes, if `shaped`."""
    shapes = leaf_paths(model.shapes)
    sources, newly_initialized = {}, set()
    for leaf, tensor in model.tensors.items():
        shape, names = tensor.shape(shapes[leaf].shape), tensor.names(shapes[leaf].shape)
        stored = [_stored(name, model, entries) for name in names]
        for other in tensor.others:
            if stored[0] not in entries:
                stored = [_stored(name, model, entries) for name in tensor.names(shapes[leaf].shape, other)]
        missing = [name for name, there in zip(names, stored, strict=True) if there not in entries]
        if len(missing) == len(names) and leaf.split('/')[0] in model.heads:
            newly_initialized.add(leaf)
            continue
        if missing:
            raise UserError(f'{folder}: tensor {missing[0]} is missing; expected {list(shape)}')
        for name in stored:
            if shaped and entries[name].shape != shape:
                raise UserError(
                    f'{folder}: tensor {name} is {list(entries[name].shape)}; by config.json expected {list(shape)}'
                )
        sources[leaf] = [entries[name] for name in stored]
    stacks = {tensor.name.split('{}')[0] for tensor in model.tensors.values() if tensor.stacked}
    stacks = tuple(name for stack in stacks for name in _folder_names(stack, model.base_prefix))
    for name in _unused(model, entries, sources):
        if name.startswith(stacks):
            raise UserError(f'{folder}: tensor {name} has no place in the model that config.json describes')
    return sources, newly_initialized


def _unused(model: Model, entries: Mapping[str, Entry], sources: Mapping[str, list[Entry]]) -> list[str]:
    """Names of a folder's tensors that make no parameter, without those that the family ignores."""
    used = {id(entry) for leaf in sources.values() for entry in leaf}
    left = (name for name, entry in entries.items() if id(entry) not in used)
    return [name for name in left if not any(re.search(pattern, name) for pattern in model.ignored)]


def _folder_names(name: str, base_prefix: str) -> tuple[str, ...]:
    """The names that a tensor may have: in the whole model, in one that reads images too, or in one without a head."""
    inner = name.removeprefix(base_prefix)
    images = f'language_model.{name}', f'{base_prefix}language_model.{inner}', f'language_model.{inner}'
    return name, *(images if inner != name else images[:1]), inner


def _stored(name: str, model: Model, entries: Mapping[str, Entry]) -> str:
    """The name that a tensor has in a folder."""
    names = _folder_names(name, model.base_prefix)
    return next((name for name in names if name in entries), names[-1])


@functools.cache
def _empty_maker(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)


def _empty(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> jax.Array:
    return _empty_maker(shape, dtype, sharding)()


def _empty_encoded(codec: Codec, shape: tuple[int, ...], sharding: Any) -> NF4:
    shapes = jax.eval_shape(codec.encode_kernel, jax.ShapeDtypeStruct(shape, np.float32))
    make = lambda: jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)  # noqa: E731
    return jax.jit(make, out_shardings=sharding)()


def _replicated(sharding: Any) -> Any:
    """Copied to every device of a parameter that lies as `sharding` says."""
    first = jax.tree.leaves(sharding)[0]
    return NamedSharding(first.mesh, P()) if isinstance(first, NamedSharding) else first


def _wait(pending: tuple[Entry, tuple[Any, jax.Array]] | None) -> None:
    """Waits until a part is in its place, and refuses it where a number of it is not finite."""
    if pending is None:
        return
    entry, written = pending
    _, finite = jax.block_until_ready(written)
    if not finite.addressable_data(0):
        raise not_finite(entry)


def not_finite(entry: Entry) -> UserError:
    """What to say of a tensor with NaN or infinite numbers."""
    return UserError(f'{entry.path}: tensor {entry.name} holds NaN or infinite numbers; expected finite weights')


@functools.cache
def _put_encoded(codec: Codec, tensor: Tensor, sharding: Any) -> Callable[..., tuple[NF4, jax.Array]]:
    """Compiled: quantises one tensor's matrices into their place; tells whether all of them are finite."""

    def put(leaf: NF4, matrix: jax.Array, at: tuple[Any, ...]) -> tuple[NF4, jax.Array]:
        encoded = codec.encode_kernel(matrix.swapaxes(-1, -2) if tensor.transposed else matrix)
        return jax.tree.map(functools.partial(_placed, at=at), leaf, encoded), jax.numpy.isfinite(matrix).all()

    return jax.jit(put, donate_argnums=0, out_shardings=(sharding, _replicated(sharding)))


def _placed(stack: jax.Array, one: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    """A stack with one of its arrays replaced, that at the index `at` into its leading dimensions."""
    one = one.reshape((1,) * len(at) + one.shape)
    return jax.lax.dynamic_update_slice(stack, one, (*at, *(0,) * (stack.ndim - len(at))))


def _part_sharding(tensor: Tensor, sharding: Any, ndim: int) -> Any:
    """How one tensor lies, as the file has it, when the parameter of `ndim` dimensions lies as `sharding` says."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *(None,) * (ndim - len(sharding.spec))][tensor.stacked :]
    if tensor.transposed:
        spec[-2:] = spec[-2:][::-1]
    return NamedSharding(sharding.mesh, P(*spec))


def _parts(entry: Entry, sharding: Any) -> Iterator[tuple[jax.Array, int | None]]:
    """A tensor on its devices: whole, or where its rows lie together in parts of rows, with each part's first row."""
    rows = entry.shape[0] if entry.shape else 1
    count = -(-math.prod(entry.shape) * entry.dtype.itemsize // _PART_BYTES)
    divided = isinstance(sharding, NamedSharding) and len(sharding.spec) and sharding.spec[0] is not None
    size = rows if divided or count <= 1 else -(-rows // count)
    for first in range(0, rows, size):
        shape = (min(size, rows - first), *entry.shape[1:]) if entry.shape else ()
        yield _on_devices(entry, first, shape, sharding), first if size < rows else None


def _on_devices(entry: Entry, first: int, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    read: dict[str, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        if str(index) not in read:  # devices that hold the same part share one reading
            moved = index
            if index:
                start, stop, _ = index[0].indices(shape[0])
                moved = (slice(first + start, first + stop), *index[1:])
            values = entry.read(moved)
            read[str(index)] = values.astype(np.float32) if values.dtype == np.float64 else values
        return read[str(index)]

    return jax.make_array_from_callback(shape, sharding, shard)


@functools.cache
def _put(tensor: Tensor, sharding: Any, in_parts: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled: writes a part of a tensor into its parameter in place; tells whether all of it is finite."""

    def put(
        leaf: jax.Array, part: jax.Array, at: tuple[Any, ...], start: int | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        starts: list[Any] = [*at, *(0,) * (leaf.ndim - len(at))]
        if in_parts:  # a start that is known to be 0 keeps divided dimensions where they are
            starts[-1 if tensor.transposed and part.ndim == 2 else len(at)] = start
        part = (part.swapaxes(-1, -2) if tensor.transposed else part).astype(leaf.dtype)
        finite = jax.numpy.isfinite(part).all()
        return jax.lax.dynamic_update_slice(leaf, part.reshape((1,) * len(at) + part.shape), starts), finite

    return jax.jit(put, donate_argnums=0, out_shardings=(sharding, _replicated(sharding)))


class _Write:
    """One tensor to write: its name, where its values are, and what it becomes."""

    def __init__(self, tensor: Tensor, leaf: jax.Array, at: tuple[int, ...], name: str, dtype: np.dtype) -> None:
        self.tensor, self.leaf, self.at, self.name, self.dtype = tensor, leaf, at, name, dtype
        self.shape = tensor.shape(leaf.shape)
        self.nbytes = math.prod(self.shape) * dtype.itemsize


def _plan(model: Model, leaves: Mapping[str, jax.Array], dtypes: Mapping[str, np.dtype]) -> Iterator[_Write]:
    """All tensors, layer by layer."""
    writes = []
    for leaf, tensor in model.tensors.items():
        value = leaves[leaf]
        dtype, stack = np.dtype(dtypes.get(leaf, value.dtype)), value.shape[: tensor.stacked]
        for at, name in zip(np.ndindex(stack), tensor.names(value.shape), strict=True):
            layer = (tensor.numbers[at[0]] if tensor.numbers else at[0]) if at else -1
            writes.append((layer, _Write(tensor, value, at, name, dtype)))
    return (write for _, write in sorted(writes, key=lambda pair: pair[0]))


def _cut(plan: list[_Write], max_bytes: int) -> dict[str, list[_Write]]:
    groups, size = [[]], 0
    for write in plan:
        if groups[-1] and size + write.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(write)
        size += write.nbytes
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
    return {f'model-{i + 1:05d}-of-{len(groups):05d}.safetensors': group for i, group in enumerate(groups)}


@functools.cache
def _take(transposed: bool, dtype: np.dtype, sharding: Any) -> Callable[..., jax.Array]:
    def take(leaf: jax.Array, at: tuple[Any, ...]) -> jax.Array:
        for number in at:
            leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
        return (leaf.swapaxes(-1, -2) if transposed else leaf).astype(dtype)

    return jax.jit(take, out_shardings=sharding)


def _fetch(write: _Write, wanted: bool) -> np.ndarray | None:
    """A tensor's values in this process's memory, gathered from all processes where they are divided among several."""
    leaf = write.leaf
    remote = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    sharding = NamedSharding(cast(NamedSharding, leaf.sharding).mesh, P()) if remote else None
    value = _take(write.tensor.transposed, write.dtype, sharding)(leaf, write.at)
    if not wanted:
        return None
    return np.asarray(value.addressable_data(0) if remote else value)


def _write_configs(folder: pathlib.Path, model: Model, dtype: str) -> None:
    (folder / 'config.json').write_text(config_json(model.hf_config, model.architecture, dtype), 'utf-8')
    names = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
    values = {name: model.hf_config[name] for name in names if model.hf_config.get(name) is not None}
    (folder / 'generation_config.json').write_text(json.dumps(values, indent=2) + '\n', 'utf-8')
