"""Seconds of a compiled program on a chip: each instruction's, times the trips of the loops around it.

On TPUs the compiler writes its own estimate in cycles beside every fusion. Elsewhere an instruction takes what its
products need at the chip's peak or its bytes at the memory's bandwidth, whichever is longer (the roofline model,
Williams et al. 2009, doi:10.1145/1498765.1498785). A computation takes at least as long as the links need for what
it moves while it computes. It is a model of one device that shares its links with nobody: good for finding what costs
and for comparing two programs, not a measurement.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from jaxtune.cost import collectives, kernels, parts, work
from jaxtune.cost.chips import Chip
from jaxtune.cost.hlo import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives that are alike.

    Attributes:
      kind: `all-gather` and its like.
      axes: axes of the mesh, joined by `+`.
      largest: the largest array of one, such as `bf16[4096,14336]`.
      hidden: whether it runs beside other work.
      count: how often in the program.
      nbytes: what a device sends in all of them.
      seconds: at the speed of the chip's links.
    """

    kind: str
    axes: str
    largest: str
    hidden: bool
    count: int
    nbytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel's calls, by our own model of its time.

    Attributes:
      name: of the kernel.
      count: calls in the program.
      seconds: of all of them.
    """

    name: str
    count: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a program takes on one device.

    Attributes:
      seconds: altogether.
      blocking_seconds: of them, waiting for collectives.
      hidden_seconds: of the links, beside other work.
      parts: (layer part, phase) -> seconds of computing.
      kernels: those whose time is modelled.
      collectives: largest first.
    """

    seconds: float
    blocking_seconds: float
    hidden_seconds: float
    parts: Mapping[tuple[str, str], float]
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]


_Counts = functools.partial(collections.defaultdict, float)


@dataclasses.dataclass
class _Sum:
    """What a computation takes: seconds that pass, those of waiting, those of links beside work."""

    seconds: float = 0.0
    blocking: float = 0.0
    hidden: float = 0.0
    parts: dict[Any, float] = dataclasses.field(default_factory=_Counts)
    kernels: dict[Any, float] = dataclasses.field(default_factory=_Counts)
    calls: dict[Any, float] = dataclasses.field(default_factory=_Counts)
    moved: dict[Any, float] = dataclasses.field(default_factory=_Counts)

    def add(self, other: '_Sum', times: int = 1) -> None:
        self.seconds += times * other.seconds
        self.blocking += times * other.blocking
        self.hidden += times * other.hidden
        for name in ('parts', 'kernels', 'calls', 'moved'):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


def estimate(module: Module, chip: Chip, mesh: Mapping[str, int], attended: float = 1.0) -> Estimate | None:
    """What a program takes.

    Args:
      module: the program of one device.
      chip: what it runs on.
      mesh: sizes of the mesh's axes.
      attended: share of all pairs of its queries and keys that the busiest device's attention needs, by its mask;
        kernels skip the rest.

    Returns:
      The estimate; None where a TPU's program holds no cycles.
    """
    walk = _Walk(module, chip, mesh, kernels.Shares(attended, 1 / mesh.get('expert', 1)))
    total = walk.computation(module.entry)
    if not total.seconds:
        return None
    moved = [
        Collective(one.kind, one.axes, one.largest, hidden, int(n), n * one.nbytes, n * one.nbytes / chip.link)
        for (one, hidden), n in total.moved.items()
    ]
    called = [Kernel(name, int(total.calls[name]), seconds) for name, seconds in _largest(total.kernels)]
    return Estimate(
        total.seconds,
        total.blocking,
        total.hidden,
        dict(_largest(total.parts)),
        tuple(called),
        tuple(sorted(moved, key=lambda one: -one.nbytes)),
    )


def _largest(seconds: Mapping[Any, float]) -> list[tuple[Any, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


@dataclasses.dataclass
class _Walk:
    module: Module
    chip: Chip
    mesh: Mapping[str, int]
    shares: kernels.Shares
    _known: dict[str, _Sum] = dataclasses.field(default_factory=dict)

    def computation(self, name: str) -> _Sum:
        """What one run of a computation takes."""
        if name not in self._known:
            computation, total = self.module.computations.get(name, {}), _Sum()
            linked = 0.0  # seconds of links beside this computation's own work; a loop has seen to its own
            for instruction in computation.values():
                before = total.hidden
                nested = self._step(computation, instruction, total)
                linked += 0.0 if nested else total.hidden - before
            # What is hidden takes at least as long as the links need.
            total.seconds = max(total.seconds, total.blocking + linked)
            self._known[name] = total
        return self._known[name]

    def _step(self, computation: Computation, instruction: Instruction, total: _Sum) -> bool:
        """Adds an instruction; returns whether it is a computation of its own."""
        if instruction.opcode == 'while':
            body = instruction.attribute(r'body=%?([\w.\-]+)')
            total.add(self.computation(body), self.module.trips(instruction))
            return True
        if instruction.opcode == 'call' and instruction.called:
            total.add(self.computation(instruction.called[0]))
            return True
        if instruction.opcode == 'conditional':
            listed = instruction.attribute(r'branch_computations=\{([^}]*)\}') or ' '.join(
                re.findall(r'(?:true|false)_computation=(\S+)', instruction.text)
            )
            branches = [self.computation(name) for name in re.findall(r'[\w.\-]+', listed)]
            if branches:
                total.add(max(branches, key=lambda one: one.seconds))
            return True
        if collectives.starts(instruction):
            hidden = instruction.opcode.endswith('-start') and '"is_sync":true' not in instruction.text
            self._move(total, collectives.read(computation, instruction, self.mesh), hidden)
            return False
        self._fused_collectives(instruction, total)
        if instruction.opcode == 'custom-call' and self._kernel(computation, instruction, total):
            return False
        seconds = self._seconds(computation, instruction)
        if seconds:
            total.seconds += seconds
            total.parts[parts.of(instruction.op_name)] += seconds
        return False

    def _move(self, total: _Sum, moved: collectives.Moved, hidden: bool) -> None:
        seconds = moved.nbytes / self.chip.link
        total.moved[moved, hidden] += 1
        if hidden:
            total.hidden += seconds
        else:
            total.blocking += seconds
            total.seconds += seconds

    def _fused_collectives(self, instruction: Instruction, total: _Sum) -> None:
        """On TPU collectives are fused with other work, and a reduce-scatter is an all-reduce fused with its slice."""
        if instruction.opcode != 'fusion' or instruction.name.startswith('async-collective-done'):
            return
        for name in instruction.called:
            if name.startswith('async_collective_fusion'):
                continue  # one that goes on beside other work; it was counted where it starts
            inner = self.module.computations.get(name, {})
            for one in inner.values():
                if kind := collectives.starts(one):
                    scatters = 'all-reduce-scatter' in instruction.text
                    kind = 'reduce-scatter' if scatters else kind
                    self._move(total, collectives.read(inner, one, self.mesh, kind), not scatters)

    def _kernel(self, computation: Computation, call: Instruction, total: _Sum) -> bool:
        done = kernels.work(call, work.operand_arrays(computation, call), self.shares)
        if done is None and call.attribute(r'custom_call_target="([^"]*)"') != 'tpu_custom_call':
            return False
        seconds = self.chip.memory_seconds(work.moved_bytes(self.module, computation, call))
        if done is not None:
            share = done.share / self.chip.product_share if done.share else 1.0
            seconds = max(self.chip.product_seconds(done.flops, done.dtype) / share, seconds)
        seconds += self.chip.launch
        total.seconds += seconds
        total.parts[parts.of(call.op_name)] += seconds
        if done is None or done.share:
            name = kernels.label(call)
            total.calls[name] += 1
            total.kernels[name] += seconds
        return True

    def _seconds(self, computation: Computation, instruction: Instruction) -> float:
        if self.chip.platform == 'tpu':
            return int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0) / self.chip.clock
        moved = work.moved_bytes(self.module, computation, instruction)
        multiplied = work.products(self.module, computation, instruction)
        if not moved and not multiplied:
            return 0.0
        products = sum(self.chip.product_seconds(flops, dtype) for dtype, flops in multiplied.items())
        return max(products, self.chip.memory_seconds(moved)) + self.chip.launch
