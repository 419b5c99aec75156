"""MXFP4 tensors of a folder, read as the wide ones that they stand for.

Four bits a number, e2m1, in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0, 2023). gpt-oss keeps
its experts so: `NAME_blocks [experts, out, blocks, 16]` uint8 and `NAME_scales [experts, out, blocks]` uint8 stand for
`NAME [experts, in, out]`, of which bfloat16 holds every number.
"""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jaxtune.errors import UserError
from jaxtune.models.safetensors import Entry

# What a code means: a sign, two bits of exponent, one of mantissa.
_HALF = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1)  # of a byte; the lower half comes first
_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Mxfp4(Entry):
    """A tensor `[experts, in, out]` of which a file holds codes and scales; `offset` is that of the codes."""

    blocks: Entry | None = None
    scales: Entry | None = None

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that `index` selects, in bfloat16.

        Raises:
          UserError: the file is truncated.
        """
        assert self.blocks is not None  # `joined` makes it with both
        assert self.scales is not None
        experts, inputs, outputs = (*index, *(slice(None),) * (3 - len(index)))
        codes, powers = self.blocks.read((experts, outputs)), self.scales.read((experts, outputs))
        values = _PAIRS[codes].reshape(*codes.shape[:-1], _BLOCK)
        wide = np.ldexp(values, powers.astype(np.int32)[..., None] - 127)
        return wide.reshape(*wide.shape[:-2], -1)[..., inputs].swapaxes(-1, -2).astype(ml_dtypes.bfloat16)


def joined(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a folder, each pair of codes and scales as the one that they stand for.

    Raises:
      UserError: codes and scales do not fit together.
    """
    pairs = {}
    for end, blocks in entries.items():
        name = end.removesuffix('_blocks')
        if end.endswith('_blocks') and f'{name}_scales' in entries:
            pairs[name] = (blocks, entries[f'{name}_scales'])
    taken = {f'{name}_{part}' for name in pairs for part in ('blocks', 'scales')}
    rest = {name: entry for name, entry in entries.items() if name not in taken}
    for name, (blocks, scales) in pairs.items():
        experts = blocks.shape[:-2]
        if len(blocks.shape) != 4 or blocks.shape[-1] * 2 != _BLOCK or blocks.shape[:-1] != scales.shape:
            raise UserError(
                f'{blocks.path}: tensor {blocks.name} is {list(blocks.shape)}, its scales {list(scales.shape)}; '
                f'expected [experts, out, blocks, {_BLOCK // 2}] and the same without the last'
            )
        shape = (experts[0], blocks.shape[-2] * _BLOCK, experts[1])
        dtype = np.dtype(ml_dtypes.bfloat16)
        rest[name] = Mxfp4(blocks.path, blocks.offset, dtype, shape, name, blocks, scales)
    return rest
