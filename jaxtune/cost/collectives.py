"""Collectives of a compiled program: which, over which axes of the mesh, how many bytes."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from jaxtune.cost.hlo import Computation, Instruction
from jaxtune.cost.work import operand_arrays

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_OPCODE = re.compile(rf'({"|".join(KINDS)})(-start)?')


@dataclasses.dataclass(frozen=True)
class Moved:
    """One collective.

    Attributes:
      kind: one of `KINDS`.
      axes: axes of the mesh over which devices differ, joined by `+`; '' of one device.
      nbytes: what a device sends.
      largest: its largest array.
    """

    kind: str
    axes: str
    nbytes: float
    largest: str


def starts(instruction: Instruction) -> str:
    """The kind of collective that an instruction is or begins; '' for all others."""
    match = _OPCODE.fullmatch(instruction.opcode)
    return match[1] if match else ''


def read(computation: Computation, instruction: Instruction, mesh: Mapping[str, int], kind: str = '') -> Moved:
    """What a collective moves, by the algorithms whose bytes are least.

    Args:
      computation: the one that it stands in.
      instruction: the collective.
      mesh: sizes of the mesh's axes, in its order; the program's devices are numbered along them.
      kind: what it is where its opcode does not say.
    """
    kind = kind or starts(instruction)
    group = _group(instruction, math.prod(mesh.values()))
    n = len(group)
    whole = sum(array.nbytes for array in operand_arrays(computation, instruction))
    shares = {
        'all-gather': n - 1.0,
        'all-reduce': 2.0 * (n - 1) / n,
        'reduce-scatter': (n - 1) / n,
        'all-to-all': (n - 1) / n,
    }
    largest = max(instruction.results, key=lambda array: array.nbytes, default='')
    return Moved(kind, _axes(group, mesh), whole * shares.get(kind, 1.0), str(largest))


def _group(instruction: Instruction, count: int) -> np.ndarray:
    """Numbers of the devices that take part together with the first one."""
    everyone = np.arange(count)
    if instruction.opcode.startswith('collective-permute'):
        pairs = re.findall(r'\{(\d+),(\d+)\}', instruction.attribute(r'source_target_pairs=(\{.*?\}\})'))
        return np.array(next(([int(a), int(b)] for a, b in pairs if a != b), [0]))
    text = instruction.text
    if match := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
        return np.array([int(n) for n in match[1].split(',')])
    if match := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
        shape, dims = ([int(n) for n in match[i].split(',')] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in match[3].split(',')]) if match[3] else ids
        return ids.reshape(shape)[0]
    if match := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        along = re.findall(r"'([^']+)'", match[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if name in along else 0 for name in sizes)].reshape(-1)
    return everyone


def _axes(group: np.ndarray, mesh: Mapping[str, int]) -> str:
    if len(group) < 2 or group.max() >= math.prod(mesh.values()):
        return ''
    places = np.unravel_index(group, tuple(mesh.values()))
    return '+'.join(name for name, place in zip(mesh, places, strict=True) if (place != place[0]).any())
