"""What one instruction of a compiled program does: FLOPs of its products, bytes that it reads and writes."""

import math
from collections.abc import Iterable

from jaxtune.cost.hlo import Array, Computation, Instruction, Module

# These move no bytes: they name, count or view what is there.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id', 'iota',
    'domain', 'opt-barrier', 'add-dependency', 'get-dimension-size', 'while', 'call', 'conditional',
))  # fmt: skip
_BESIDE = ('-start', '-update', '-done')  # ends of what runs beside other work: copies, slices, collectives
_SLICES = frozenset(('dynamic-slice', 'slice', 'gather'))
_VIEWS = frozenset(('bitcast', 'reshape', 'convert', 'copy'))


def products(module: Module, computation: Computation, instruction: Instruction) -> dict[str, float]:
    """FLOPs of the matrix products in an instruction, by the type of what is multiplied; two a multiply and add."""
    flops: dict[str, float] = {}

    def count(within: Computation, one: Instruction) -> None:
        if one.opcode in ('dot', 'convolution'):
            kind = _first(operand_arrays(within, one), one).dtype
            flops[kind] = flops.get(kind, 0.0) + _product(within, one)
        elif one.opcode in ('fusion', 'call', 'custom-call'):
            for name in one.called:
                for inner in module.computations.get(name, {}).values():
                    count(module.computations[name], inner)

    count(computation, instruction)
    return flops


def operand_arrays(computation: Computation, instruction: Instruction) -> list[Array]:
    """The arrays that an instruction reads."""
    known = (computation[name] for name in instruction.operands if name in computation)
    return [array for operand in known for array in operand.results]


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction reads and writes; of what it takes a slice of or changes in place, the slice alone."""
    if instruction.opcode in _FREE or instruction.opcode.endswith(_BESIDE):
        return 0
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * _operand(computation, instruction, 1)
    if instruction.opcode in _SLICES:
        return 2 * instruction.nbytes
    if instruction.opcode != 'fusion' or not instruction.called:
        return instruction.nbytes + sum(_operand(computation, instruction, n) for n in range(len(instruction.operands)))
    inner = module.computations.get(instruction.called[0], {})
    read = 0
    for parameter in inner.values():
        if parameter.opcode == 'parameter':
            number = int(parameter.attribute(r'parameter\((\d+)\)') or 0)
            read += min(_read(inner, parameter), _operand(computation, instruction, number))
    return read + _written(inner, instruction)


def _first(found: Iterable[Array], instruction: Instruction) -> Array:
    return next(iter(found), instruction.results[0])


def _operand(computation: Computation, instruction: Instruction, number: int) -> int:
    name = instruction.operands[number] if number < len(instruction.operands) else ''
    return computation[name].nbytes if name in computation else 0


def _product(computation: Computation, instruction: Instruction) -> float:
    out = instruction.results[0].size
    read = [computation[name].results[0] for name in instruction.operands[:2] if name in computation]
    if len(read) < 2:
        return 0.0
    if instruction.opcode == 'dot':
        return 2.0 * out * math.prod(read[0].dims[axis] for axis in instruction.numbers('lhs_contracting_dims'))
    labels = instruction.attribute(r'dim_labels=\w+_(\w+)->')
    if len(labels) != len(read[1].dims):
        return 0.0
    return 2.0 * out * math.prod(n for label, n in zip(labels, read[1].dims, strict=True) if label != 'o')


def _read(inner: Computation, value: Instruction) -> int:
    """Bytes of a fusion's parameter that its computation reads."""
    total = 0
    for user in inner.values():
        if value.name not in user.operands:
            continue
        first = user.operands[0] == value.name
        if user.opcode in _SLICES and first:
            total += user.nbytes
        elif user.opcode == 'dynamic-update-slice' and first:
            continue
        elif user.opcode in _VIEWS:
            total += _read(inner, user)
        else:
            return value.nbytes
    return min(total, value.nbytes)


def _written(inner: Computation, instruction: Instruction) -> int:
    """Bytes of a fusion's result that are written: what replaces a slice, where the rest stays as it is."""
    root = next((one for one in inner.values() if one.root), None)
    if root is None:
        return instruction.nbytes
    outputs = [inner[name] for name in root.operands if name in inner] if root.opcode == 'tuple' else [root]
    total = 0
    for output in outputs:
        source = output
        while source.opcode in _VIEWS and source.operands and source.operands[0] in inner:
            source = inner[source.operands[0]]
        in_place = source.opcode == 'dynamic-update-slice'
        total += _operand(inner, source, 1) if in_place else output.nbytes
    return total
