"""The mesh of devices and the names of its axes."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxtune.errors import UserError
from jaxtune.parallel.topology import CARDS

AXES = ('data', 'fsdp', 'tensor', 'sequence', 'expert')
BATCH_AXES = ('data', 'fsdp', 'expert')

# What a dimension of an activation is -> the mesh axes that divide it.
_LOGICAL: dict[str | None, tuple[str, ...]] = {
    'batch': BATCH_AXES,
    'copy': ('data', 'expert'),
    'width': ('fsdp',),
    'length': ('sequence',),
    'heads': ('tensor',),
    'mlp': ('tensor',),
    'vocab': ('tensor',),
}


def mesh_shape(sizes: dict[str, int], devices: int) -> tuple[int, ...]:
    """Sizes of the axes in `AXES` order, with the one -1 filled in.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    text = ', '.join(f'mesh.{axis}={size}' for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f'{text}: expected positive sizes, at most one of them -1')
    known = math.prod(size for size in shape if size != -1)
    if devices % known or (-1 not in shape and known != devices):
        raise UserError(f'{text}: the sizes must multiply to the number of devices, which is {devices}')
    return tuple(devices // known if size == -1 else size for size in shape)


def _slices(devices: list[Any], slices: int, text: str) -> list[list[Any]]:
    """The devices of each slice, in order: by their `slice_index`, or as many processes as make up one.

    Processes stand for slices where no network is known to be faster than another (CPUs, clusters of GPUs). Several of
    them may be one slice: a GPU each, on one host.

    Raises:
      UserError: the devices cannot be so divided.
    """
    by_slice: dict[int, list[Any]] = {}
    by_process: dict[int, list[Any]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, 'slice_index', None) or 0, []).append(device)
        by_process.setdefault(device.process_index, []).append(device)
    count = len(by_slice) if slices == -1 else slices
    if count == 1 and (len(by_slice) == 1 or devices[0].platform != 'tpu'):
        return [devices]
    processes = [by_process[index] for index in sorted(by_process)]
    if count == len(by_slice):
        parts = [by_slice[index] for index in sorted(by_slice)]
    elif devices[0].platform == 'tpu':
        raise UserError(f'{text}: the number of slices of the devices is {len(by_slice)}; expected that, or -1')
    elif len(processes) % count:
        raise UserError(f'{text}: the devices are of {len(processes)} processes; expected a number that divides it')
    else:
        size = len(processes) // count
        groups = [processes[first : first + size] for first in range(0, len(processes), size)]
        parts = [[device for process in group for device in process] for group in groups]
    if len(set(map(len, parts))) > 1:
        sizes = ', '.join(str(len(part)) for part in parts)
        raise UserError(f'{text}: expected slices of equally many devices, found {sizes}')
    return parts


def make_mesh(sizes: dict[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor`, `sequence`, `expert` over all devices (or those given).

    Over slices, groups of devices joined by a slower network, runs `data` alone, whose only exchange is the sum of the
    gradients; the other axes stay within each.

    Args:
      sizes: axis name -> size, 1 where it is not named; one may be -1, the rest of the devices. `slices` among them:
        how many there are, 1 where it is not named, -1 as many as the devices say.
      devices: of `jax.Device`, which is no type to a checker; default `jax.devices()`.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or these are not of so many slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    given = int(sizes.get('slices', 1))
    parts = _slices(devices, given, f'mesh.slices={given}')
    data, *others = shape
    if data % len(parts):
        raise UserError(
            f'mesh.data={data}: expected a multiple of the {len(parts)} slices (mesh.slices), over which it runs'
        )
    inner = (data // len(parts), *others)
    grid = np.concatenate([_grid(inner, part) for part in parts])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices of one slice: neighbours on the chips' torus become neighbours on an axis."""
    try:  # an axis need not be a whole side of the torus
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # the two cores of a v4 chip, when compiling ahead: on the machine they are one device
        return np.asarray(devices).reshape(shape)


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def axis_size(*axes: str) -> int:
    """Product of the sizes of mesh axes in the mesh that is set (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def auto_axes() -> tuple[str, ...]:
    """Axes of the mesh that is set that are not manual here (inside `shard_map`); none on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)


def dividing_axes(size: int, *choices: tuple[str, ...]) -> tuple[str, ...]:
    """The first of `choices` that divides a dimension, less axes that are manual here or of one device; else none."""
    auto = auto_axes()
    for choice in choices:
        axes = tuple(axis for axis in choice if axis in auto and axis_size(axis) > 1)
        if axes and size % axis_size(*axes) == 0:
            return axes
    return ()


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Hints how an activation is divided: one of `batch`, `length`, `heads`, `mlp`, `vocab` or None a dimension.

    `copy` and `width` are rows and features of an activation that still lies as the parameter it was read from.

    Axes that are manual here (inside `shard_map`) or that do not divide the dimension are left out; without a mesh it
    returns `x` as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    spec = []
    for size, dim in zip(x.shape, dims, strict=True):
        axes = tuple(axis for axis in _LOGICAL.get(dim, ()) if types.get(axis) == AxisType.Auto)
        spec.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    if not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def platform() -> str:
    """Where the program being traced will run: the mesh knows it when compiling for a machine that is not there."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What JAX calls the devices that the program being traced will run on, such as `TPU v5 lite`."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def compute_capability() -> tuple[int, ...]:
    """The CUDA compute capability of the GPU that the program being traced will run on; () where it is not known."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    cards = [] if device is None else [card for card in CARDS.values() if card.title == device.device_kind]
    if cards:
        return cards[0].capability
    stated = str(getattr(jax.devices()[0], 'compute_capability', ''))
    return tuple(map(int, stated.split('.'))) if re.fullmatch(r'\d+\.\d+', stated) else ()


def one_device() -> bool:
    """Whether the program being traced will run on one device."""
    return axis_size(*AXES) == 1


def one_cpu() -> bool:
    """Whether the program being traced will run on one CPU device."""
    return platform() == 'cpu' and one_device()


def in_order(x: jax.Array, *dims: int) -> jax.Array:
    """`x` as it is, laid out in memory with its dimensions in this order, the last of them the fastest.

    On a mesh XLA decides: its partitioner would gather an array to lay it out.
    """
    return with_layout_constraint(x, Layout(dims)) if one_device() else x


def fusion_barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays; on a TPU, what is computed of them and of their gradients is not fused into the products around.

    There a product takes a fifth to a half longer with an activation and its gradient in its operands and outputs.
    """
    return jax.lax.optimization_barrier(arrays) if platform() == 'tpu' else arrays
