"""The safetensors format, read and written tensor by tensor.

A file is the header's length (8 bytes, little endian), a JSON header, and the tensors' bytes. The `safetensors` package
maps whole files, whose pages count as this process's memory; here only the bytes that are asked for are read.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from jaxtune.errors import UserError, reason, shown

DTYPES: dict[str, np.dtype] = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16),
    'I8': np.dtype(np.int8),
    'U64': np.dtype(np.uint64),
    'U32': np.dtype(np.uint32),
    'U16': np.dtype(np.uint16),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file: where its bytes begin, its dtype, shape and name."""

    path: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    name: str = ''

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that `index` selects, in memory of its own.

        Rows that follow one another are read in one go; of other parts only the pages that they touch.
        """
        index = (*index, *(slice(None) for _ in self.shape[len(index) :]))
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        if all(bound == (0, size, 1) for bound, size in zip(bounds[1:], self.shape[1:], strict=True)):
            start, stop, step = bounds[0] if bounds else (0, 1, 1)
            if step == 1:
                row = math.prod(self.shape[1:])
                shape = (stop - start, *self.shape[1:]) if bounds else ()
                return self._read_rows(start * row, (stop - start) * row).reshape(shape)
        mapped = np.memmap(self.path, self.dtype, 'r', self.offset, self.shape)
        return np.array(mapped[index])

    def _read_rows(self, start: int, count: int) -> np.ndarray:
        values = np.empty(count, self.dtype)
        view = values.view(np.uint8).data
        with open(self.path, 'rb', buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            done = 0
            while done < len(view):
                read = file.readinto(view[done:])
                if not read:
                    raise UserError(f'{self.path}: the file is truncated; expected {len(view) - done} more bytes')
                done += read
        return values


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """Tensors of a file by name.

    Raises:
      UserError: the file is truncated or no safetensors file.
    """
    if not path.is_file():  # nor a pipe, which would be waited for
        raise UserError(f'{path}: expected a safetensors file')
    size = path.stat().st_size
    with open(path, 'rb') as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, 'little')
        if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
            raise UserError(f'{path}: truncated, or not a safetensors file')
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {
            name: _entry(path, 8 + length, size, name, spec) for name, spec in header.items() if name != '__metadata__'
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f'{path}: not a safetensors file: bad header ({reason(error)})') from None
    return entries


def _entry(path: pathlib.Path, base: int, size: int, name: str, spec: Mapping) -> Entry:
    if not isinstance(spec['dtype'], str) or spec['dtype'] not in DTYPES:
        raise UserError(f'{path}: tensor {name} has dtype {shown(spec["dtype"])}; expected one of {", ".join(DTYPES)}')
    dtype, shape = DTYPES[spec['dtype']], tuple(map(_count, spec['shape']))
    start, stop = map(_count, spec['data_offsets'])
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise UserError(f'{path}: tensor {name} has {stop - start} bytes; expected {dtype.name}{list(shape)}')
    if base + stop > size:
        raise UserError(f'{path}: truncated: {size} bytes, but tensor {name} ends at byte {base + stop}')
    return Entry(path, base + start, dtype, shape, name)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f'expected a size in bytes or elements, found {shown(value)}')
    return value


def write_file(
    path: pathlib.Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterator[np.ndarray],
) -> None:
    """Writes a file, taking one tensor at a time from `tensors`, which come in the order of `specs`.

    Args:
      path: the file.
      specs: name -> dtype and shape.
      tensors: their values.
    """
    header: dict[str, object] = {'__metadata__': {'format': 'pt'}}  # transformers refuses files without it
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            'dtype': _NAMES[np.dtype(dtype)],
            'shape': list(shape),
            'data_offsets': [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for (name, (dtype, shape)), value in zip(specs.items(), tensors, strict=True):
            if value.dtype != dtype or value.shape != tuple(shape):
                raise ValueError(f'{name}: {value.dtype}{value.shape} is not {dtype}{shape}')
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
