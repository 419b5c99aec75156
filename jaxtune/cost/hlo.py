"""A compiled program's text (HLO after optimisation), read into computations and instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

# Bits of an element; a token or opaque value has none.
_BITS = re.compile(r'\d+')

_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) [({]')
# `%name = TYPE opcode(operands), attributes`; a tuple's type is in brackets, with comments.
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type.

    Attributes:
      dtype: `bf16`, `f32`, `u8` …
      dims: its shape.
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without padding."""
        bits = _BITS.search(self.dtype)
        return self.size * (int(bits[0]) if bits else 8) // 8

    def __str__(self) -> str:
        return f'{self.dtype}[{",".join(map(str, self.dims))}]'


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its program.
      opcode: `fusion`, `dot`, `while` …
      results: the arrays of its result, more than one of a tuple.
      operands: names of what it reads.
      text: the line.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its result."""
        return sum(array.nbytes for array in self.results)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it names."""
        return tuple(_CALLED.findall(self.text))

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX's primitive that it comes from; '' where none is stated."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ''

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in its line; '' where there is none."""
        match = re.search(pattern, self.text)
        return match[1] if match else ''

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute that lists numbers, such as `dimensions={0,1}`."""
        listed = self.attribute(rf'\b{key}=\{{([\d,]*)\}}')
        return tuple(map(int, listed.split(','))) if listed else ()


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: name -> its instructions by name, in their order.
      entry: name of the computation that the program is.
    """

    computations: Mapping[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """All instructions of what a fusion or call computes, and of what those call."""
        for name in instruction.called:
            for inner in self.computations.get(name, {}).values():
                yield inner
                yield from self.inside(inner)

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs its body: as XLA states it, or a counter's bound over its step; else 1."""
        if stated := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(stated)
        condition, body = loop.attribute(r'condition=%?([\w.\-]+)'), loop.attribute(r'body=%?([\w.\-]+)')
        return _counted(self, condition, body)


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text` returns."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = '', None
    for line in _lines(text):
        if line == '}':
            current = None
        elif line.endswith('{') and (match := _HEAD.match(line)):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current[match[2]] = Instruction(
                match[2],
                match[4],
                tuple(arrays(match[3])),
                tuple(re.findall(r'%([\w.\-]+)', _bracketed(line, match.end() - 1))),
                line,
                bool(match[1]),
            )
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines, those of an attribute that spans several (a kernel's metadata) as one."""
    held = ''
    for line in text.splitlines():
        if line == '}' or line.startswith('  ') or _HEAD.match(line):
            if held:
                yield held
            held = line.rstrip()
        else:
            held += line.rstrip()
    if held:
        yield held


def arrays(kind: str) -> list[Array]:
    """The arrays of a type's text."""
    return [Array(dtype, tuple(int(n) for n in dims.split(',') if n)) for dtype, dims in _ARRAY.findall(kind)]


def _bracketed(line: str, start: int) -> str:
    """What is inside the bracket that opens at `start`."""
    depth = 0
    for index in range(start, len(line)):
        depth += (line[index] == '(') - (line[index] == ')')
        if not depth:
            return line[start + 1 : index]
    return line[start + 1 :]


def _constants(computation: Computation) -> list[int]:
    """Whole numbers that a computation holds."""
    listed = (instruction.attribute(r'[su]32\[\]\S* constant\((\d+)\)') for instruction in computation.values())
    return [int(n) for n in listed if n]


def _counted(module: Module, condition: str, body: str) -> int:
    """Trips of a loop of a counter that starts at 0."""
    tests = module.computations.get(condition, {})
    compare = next((one for one in tests.values() if one.opcode in ('compare', 'fusion')), None)
    counter = next((one for one in tests.values() if one.opcode == 'get-tuple-element'), None)
    bounds = _constants(tests)
    for name in compare.called if compare else ():
        bounds += _constants(module.computations.get(name, {}))
    bounds = [n for n in bounds if n > 0]
    if not bounds or counter is None:
        return 1
    steps = module.computations.get(body, {})
    root = next((one for one in steps.values() if one.root and one.opcode == 'tuple'), None)
    index, step = int(counter.attribute(r'index=(\d+)') or 0), 0
    added = steps.get(root.operands[index]) if root and index < len(root.operands) else None
    while added is not None and added.opcode == 'add' and len(added.operands) == 2:
        other = steps.get(added.operands[1])
        step += int((other.attribute(r'constant\((\d+)\)') if other else '') or 1)
        added = steps.get(added.operands[0])
    return -(-max(bounds) // max(step, 1))
