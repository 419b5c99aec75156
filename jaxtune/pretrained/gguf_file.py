"""A GGUF file, llama.cpp's format: written from a Hugging Face folder tensor by tensor, checked, and read back.

In a quantised file stay in float32: norms, biases and all else of one dimension, learned positions, routers of experts.
In q8_0: with `q4_0` and `q4_k` the projection to the vocabulary (of a tied model, the embedding), and with `q4_k`
tensors whose rows are no multiple of 256. Tensors whose rows are no multiple of 32 stay as the folder has them.
"""

import math
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxtune.errors import UserError
from jaxtune.models import Model
from jaxtune.models.model import Params, leaf_paths
from jaxtune.models.safetensors import Entry, read_header
from jaxtune.pretrained import gguf_families, gguf_tokenizer, q4_k
from jaxtune.pretrained.gguf_families import Part
from jaxtune.weights.tree import nested

NAME = 'model.gguf'
_KEY = 'export.format=gguf'
_QUANTISED = {'q8_0': 'Q8_0', 'q4_0': 'Q4_0', 'q4_k': 'Q4_K'}
_PLAIN = {np.dtype(np.float32): 'F32', np.dtype(np.float16): 'F16', np.dtype(ml_dtypes.bfloat16): 'BF16'}
_FILE_TYPES = {
    'F32': 'ALL_F32', 'F16': 'MOSTLY_F16', 'BF16': 'MOSTLY_BF16',
    'Q8_0': 'MOSTLY_Q8_0', 'Q4_0': 'MOSTLY_Q4_0', 'Q4_K': 'MOSTLY_Q4_K_S',
}  # fmt: skip
_WHOLE = ('position_embd.weight', 'ffn_gate_inp.weight')
_HALF = 2.0**-11  # what rounding to float16 costs at most, of a number; of small ones `_TINY` whatever they are
_TINY = 2.0**-25


def package() -> types.ModuleType:
    """The package that knows the format.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f'{_KEY}: expected the package gguf: pip install "jaxtune[gguf]"') from None
    return gguf


def check(model: Model, tokenizer: Any) -> None:
    """Refuses a model or a tokenizer that llama.cpp does not have; no weights are needed.

    Raises:
      UserError: says which, and what was expected.
    """
    gguf = package()
    gguf_families.parts(gguf, model)
    gguf_tokenizer.read(gguf, tokenizer, model.config.vocab_size)


def write(folder: pathlib.Path, model: Model, tokenizer: Any, quantise: str, name: str = '') -> None:
    """Writes `model.gguf` into a folder of the model's safetensors, and compares all of it with them.

    Args:
      folder: the folder, with weights of the dtype that the file's are to have.
      model: its model.
      tokenizer: its tokenizer.
      quantise: '' = as the folder has them; `q8_0`, `q4_0` or `q4_k`.
      name: of the model, for people.

    Raises:
      UserError: as `check` does; or a tensor that was read back is further from the folder's than the format allows.
    """
    gguf = package()
    entries: dict[str, Entry] = {}
    for file in sorted(folder.glob('*.safetensors')):
        entries |= read_header(file)
    parts = gguf_families.parts(gguf, model)
    types = {part.name: _type(part, entries, quantise, model) for part in parts}
    made = gguf_families.made_tensors(model)
    writer = gguf.GGUFWriter(folder / NAME, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[_architecture(model)]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or model.hf_config['model_type'])
    gguf_families.add_hyper_parameters(gguf, writer, model)
    largest = max(parts, key=lambda part: math.prod(part.shape))
    kind = _QUANTISED.get(quantise) or _PLAIN[entries[largest.sources[0]].dtype]
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_tokenizer.write(gguf, writer, tokenizer, model.config.vocab_size)
    for made_name, value in made.items():
        writer.add_tensor_info(made_name, value.shape, value.dtype, value.nbytes)
    for part in parts:
        qtype = gguf.GGMLQuantizationType[types[part.name]]
        shape = gguf.quant_shape_to_byte_shape(part.shape, qtype)
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in made.values():
        writer.write_tensor_data(value)
    for part in parts:
        writer.write_tensor_data(_encoded(gguf, _read(part, entries), types[part.name]))
    writer.close()
    gguf_families.note_windows(model)
    _compare(gguf, folder / NAME, parts, entries)


def load(path: pathlib.Path, model: Model, shardings: Params | None = None) -> Params:
    """Reads a file's parameters, dequantised, in the model's own dtypes.

    Args:
      path: the file.
      model: the model that it was written of.
      shardings: tree of shardings like the parameters'; None = on the first device.

    Raises:
      UserError: a tensor is missing or of another shape.
    """
    gguf = package()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    by_leaf: dict[str, list[Part]] = {}
    for part in gguf_families.parts(gguf, model):
        by_leaf.setdefault(part.leaf, []).append(part)
    placed = leaf_paths(shardings) if shardings is not None else {}
    leaves = {}
    for leaf, shape in leaf_paths(model.shapes).items():
        tensor, value = model.tensors[leaf], np.empty(shape.shape, shape.dtype)
        sources = {name: i for i, name in enumerate(tensor.names(shape.shape))}
        for part in by_leaf[leaf]:
            if part.name not in stored or tuple(stored[part.name].shape[::-1]) != part.shape:
                raise UserError(f'{path}: tensor {part.name} is missing or of another shape; expected {part.shape}')
            for source, matrix in zip(part.sources, part.to_folder(_decoded(gguf, stored[part.name])), strict=True):
                at = np.unravel_index(sources[source], shape.shape[: tensor.stacked]) if tensor.stacked else ()
                value[at] = matrix.swapaxes(-1, -2) if tensor.transposed else matrix
        sharding = placed.get(leaf)
        leaves[leaf] = (
            jax.device_put(value)
            if sharding is None
            else jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        )
    return nested(leaves)


def _architecture(model: Model) -> str:
    return gguf_families.architecture(model).name


def _read(part: Part, entries: Mapping[str, Entry]) -> np.ndarray:
    return part.from_folder([entries[source].read() for source in part.sources])


def _type(part: Part, entries: Mapping[str, Entry], quantise: str, model: Model) -> str:
    """The format of a tensor."""
    if len(part.shape) < 2 or part.name.endswith(_WHOLE):
        return 'F32'
    plain, columns = _PLAIN[entries[part.sources[0]].dtype], part.shape[-1]
    if not quantise or columns % 32:
        return plain
    head = 'token_embd.weight' if model.config.tied else 'output.weight'
    if part.name == head or (quantise == 'q4_k' and columns % q4_k.SUPER_BLOCK):
        return 'Q8_0'
    return _QUANTISED[quantise]


def _encoded(gguf: types.ModuleType, value: np.ndarray, kind: str) -> np.ndarray:
    """A tensor's bytes."""
    if kind in _PLAIN.values():
        dtype = next(dtype for dtype, name in _PLAIN.items() if name == kind)
        return np.ascontiguousarray(value.astype(dtype)).view(np.uint8)
    value = value.astype(np.float32)
    if kind == 'Q4_K':
        return q4_k.quantise(value)
    return gguf.quants.quantize(value, gguf.GGMLQuantizationType[kind])


def _decoded(gguf: types.ModuleType, tensor: Any) -> np.ndarray:
    """A tensor of a file in float32."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def bound(value: np.ndarray, kind: str) -> np.ndarray:
    """How far each block of weights may be from what is read back: `[..., blocks, 1]` for `[..., blocks, size]`.

    Q8_0 rounds to 1/127 of the block's largest weight; Q4_0 to 1/8 of it, and cuts off at 7/8 on one side; Q4_K to 1/15
    of the block's range, and its scales and minima to 1/63 of the super-block's. All keep scales in float16.
    """
    size = 32 if kind != 'Q4_K' else q4_k.SUPER_BLOCK
    blocks = np.abs(value).reshape(*value.shape[:-1], -1, size)
    largest = blocks.max(-1, keepdims=True)
    if kind == 'Q8_0':
        return largest * (0.5 / 127 + 2 * _HALF) + 127 * _TINY
    if kind == 'Q4_0':
        return largest * (1 / 8 + 2 * _HALF) + 8 * _TINY
    signed = value.reshape(blocks.shape)
    width = np.maximum(signed.max(-1, keepdims=True), 0) - np.minimum(signed.min(-1, keepdims=True), 0)
    return width / 12 + 2 * 63 * 15 * _TINY


def _compare(gguf: types.ModuleType, path: pathlib.Path, parts: list[Part], entries: Mapping[str, Entry]) -> None:
    """Compares the file with the folder that it was written of."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for part in parts:
        value, tensor = _read(part, entries).astype(np.float32), stored[part.name]
        read, kind = _decoded(gguf, tensor), tensor.tensor_type.name
        if kind in _PLAIN.values():
            near = np.array_equal(read, value)
        else:
            limit = bound(value, kind)
            error = np.abs(read - value).reshape(*limit.shape[:-1], -1)
            near = bool((error <= limit).all())
        if not near:
            raise UserError(f'{path}: tensor {part.name}: {kind} cannot hold it; expected finite weights in its range')
