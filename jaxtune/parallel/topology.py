"""Devices that are not there: the TPU slices and GPUs that XLA compiles for without having one."""

import dataclasses
import difflib
import glob
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxtune.errors import UserError

# GiB of a device's memory that XLA's TPU compiler hands out; the rest of the HBM is the runtime's. v2, v3, v4 and
# tpu7x show each of a chip's two cores as a device of its own.
TPU_GIB = {'v2': 7.48, 'v3': 15.48, 'v4': 15.25, 'v5e': 15.75, 'v5p': 95.73, 'v6e': 31.24, 'tpu7x': 94.74}
_HOST = (2, 2, 1)  # chips of a host along each axis
_TPU_EXAMPLES = 'v5e-16, v5e:4x4, v5p:2x2x1, tpu7x:2x2x1, 2xv5e:4x4 (two slices)'

# What a program can count on of a GPU's memory: the driver, the CUDA context and NCCL's buffers take the rest.
_GPU_USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU as its datasheet has it.

    Attributes:
      title: as its driver names it.
      capability: CUDA compute capability.
      cores: streaming multiprocessors.
      memory: bytes that CUDA reports as the device's total.
      bandwidth: of that memory, bytes a second.
      l2: bytes of second-level cache.
      clock: boost clock in GHz.
    """

    title: str
    capability: tuple[int, int]
    cores: int
    memory: float
    bandwidth: float
    l2: int
    clock: float


_MIB = 2**20
CARDS = {
    't4': Card('Tesla T4', (7, 5), 40, 15.6e9, 320e9, 4 * _MIB, 1.59),
    'a100-40g': Card('NVIDIA A100-SXM4-40GB', (8, 0), 108, 42.3e9, 1555e9, 40 * _MIB, 1.41),
    'a100-80g': Card('NVIDIA A100-SXM4-80GB', (8, 0), 108, 84.9e9, 2039e9, 40 * _MIB, 1.41),
    'a10g': Card('NVIDIA A10G', (8, 6), 80, 23.6e9, 600e9, 6 * _MIB, 1.71),
    'rtx3090': Card('NVIDIA GeForce RTX 3090', (8, 6), 82, 25.3e9, 936e9, 6 * _MIB, 1.70),
    'l4': Card('NVIDIA L4', (8, 9), 58, 23.6e9, 300e9, 48 * _MIB, 2.04),
    'l40s': Card('NVIDIA L40S', (8, 9), 142, 47.6e9, 864e9, 96 * _MIB, 2.52),
    'rtx4090': Card('NVIDIA GeForce RTX 4090', (8, 9), 128, 25.3e9, 1008e9, 72 * _MIB, 2.52),
    'h100': Card('NVIDIA H100 80GB HBM3', (9, 0), 132, 84.9e9, 3352e9, 50 * _MIB, 1.98),
    'h200': Card('NVIDIA H200', (9, 0), 132, 150e9, 4800e9, 60 * _MIB, 1.98),
    'b200': Card('NVIDIA B200', (10, 0), 148, 191e9, 7700e9, 126 * _MIB, 1.97),
    'rtx5090': Card('NVIDIA GeForce RTX 5090', (12, 0), 170, 33.6e9, 1792e9, 96 * _MIB, 2.41),
}

# Of a streaming multiprocessor, by compute capability: KiB of shared memory, threads, float32 units (CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability").
_MULTIPROCESSOR = {
    (7, 5): (64, 1024, 64),
    (8, 0): (164, 2048, 64),
    (8, 6): (100, 1536, 128),
    (8, 9): (100, 1536, 128),
    (9, 0): (228, 2048, 128),
    (10, 0): (228, 2048, 128),
    (12, 0): (100, 1536, 128),
}


# Chips along each axis of the slices that can be had, by their number.
_FLAT = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {
    4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8', 512: '8x8x8',
    1024: '8x8x16', 2048: '8x16x16', 4096: '16x16x16',
}  # fmt: skip
# What clouds call them: the generation and a number, of chips or of cores, of which a chip has two.
_CLOUD = {
    'v2': (_FLAT, 2), 'v3': (_FLAT, 2), 'v4': (_CUBES, 2), 'v5litepod': (_FLAT, 1), 'v5e': (_FLAT, 1),
    'v5p': (_CUBES, 2), 'v6e': (_FLAT, 1), 'tpu7x': (_CUBES, 1),
}  # fmt: skip


def canonical(name: str) -> str:
    """A topology's name as XLA has it: `v5e-4` is `v5e:2x2`, `v5p-8` (cores) `v5p:2x2x1`, `h100x8` `cuda:h100x8`.

    A number of TPU slices stays before it: `2xv5e-4` is `2xv5e:2x2`.

    Raises:
      UserError: a slice of a size that there is none of.
    """
    slices, one = _count(name)
    kind, dash, number = one.partition('-')
    if dash and kind in _CLOUD and number.isdecimal():
        shapes, cores = _CLOUD[kind]
        shape = shapes.get(int(number) // cores) if int(number) % cores == 0 else None
        if shape is None:
            sizes = ', '.join(f'{kind}-{chips * cores}' for chips in shapes)
            raise UserError(f'compile.topology={name!r}: expected a slice that there is: {sizes}')
        return f'{f"{slices}x" if slices > 1 else ""}{"v5e" if kind == "v5litepod" else kind}:{shape}'
    card = name.removeprefix('cuda:')
    if card in CARDS:
        return f'cuda:{card}x1'
    bare, _, count = card.rpartition('x')
    return f'cuda:{card}' if bare in CARDS and count.isdecimal() else name


def larger(name: str) -> list[str]:
    """Names of the same hardware with more devices, the fewest first; in the style of the name, none for ''."""
    if not name:
        return []
    slices, name = _count(name)
    times = f'{slices}x' if slices > 1 else ''
    kind, shape = canonical(name).split(':')
    if kind == 'cuda':
        card, count = _card(name, shape)
        counts = [n for n in (*(2**i for i in range(1, 4)), *(8 * 2**i for i in range(1, 8))) if n > count]
        label = next(label for label, known in CARDS.items() if known is card)
        return [f'{label}x{n}' for n in counts]
    style = name.partition('-')[0]
    shapes, cores = _CLOUD.get(style if style in _CLOUD else kind, (_CUBES, 1))
    chips = math.prod(map(int, shape.split('x')))
    more = {n: dims for n, dims in shapes.items() if n > chips}
    return [times + (f'{style}-{n * cores}' if '-' in name else f'{kind}:{dims}') for n, dims in more.items()]


def _count(name: str) -> tuple[int, str]:
    """How many slices a topology is, and the name of one: `2xv5e:4x4` is 2 and `v5e:4x4`."""
    match = re.fullmatch(r'([1-9]\d{0,4})x((?:v\d|tpu).+)', name)
    return (int(match[1]), match[2]) if match else (1, name)


def topology_devices(name: str) -> list[Any]:
    """Devices (`jax.Device`) to compile for, without having them.

    Args:
      name: `v5e:4x4`, `v5p:2x2x1` … for a TPU slice, its chips along each axis, `2xv5e:4x4` for two of them;
        `cuda:h200x8` … for GPUs, one host's at most 8 or whole hosts of 8; or as `canonical` reads it.

    Raises:
      UserError: no such hardware, or the package that compiles for it is not installed; names `compile.topology`.
    """
    # JAX loads all plugins at once. CUDA's checks the driver and the libraries of this machine, which has neither.
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
    name = canonical(name)
    slices, one = _count(name)
    kind, _, shape = one.partition(':')
    if kind == 'cuda':
        return _cuda(name, *_card(name, shape))
    if kind in TPU_GIB:
        return _tpu(name, one, slices)
    near = difflib.get_close_matches(kind, [*TPU_GIB, 'cuda'], 1, 0.4)
    hint = f' (nearest: {near[0]})' if near else ''
    raise UserError(f'compile.topology={name!r}: expected a TPU such as {_TPU_EXAMPLES}, or GPUs such as h200x8{hint}')


def usable_bytes(name: str) -> int:
    """Bytes of memory that a program can use on each device of a topology that `topology_devices` knows."""
    name = canonical(name)
    kind, _, shape = _count(name)[1].partition(':')
    if kind == 'cuda':
        return int(_card(name, shape)[0].memory * _GPU_USABLE)
    return int(TPU_GIB[kind] * 2**30)


def _tpu(name: str, one: str, slices: int) -> list[Any]:
    if not re.fullmatch(r'[^:]+:\d{1,6}(x\d{1,6}){1,2}', one):
        raise UserError(f'compile.topology={name!r}: expected its chips along each axis, such as {_TPU_EXAMPLES}')
    if not glob.glob('/dev/accel*') and not glob.glob('/dev/vfio/[0-9]*'):
        # Otherwise libtpu asks around for the host that it is on, complains, and lets one process in at a time.
        os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
        for key, value in (
            ('ACCELERATOR_TYPE', 'v5litepod-1'),
            ('WORKER_HOSTNAMES', 'localhost'),
            ('SKIP_MDS_QUERY', '1'),
        ):
            os.environ.setdefault(f'TPU_{key}', value)
    chips = (*map(int, one.partition(':')[2].split('x')), 1)[:3]
    # Less than a host's 2 x 2 chips are a host of their own; some versions of libtpu refuse them if that is not said.
    options: dict[str, Any] = {'num_slices': slices} if slices > 1 else {}
    if all(n <= most for n, most in zip(chips, _HOST, strict=True)):
        options['chips_per_host_bounds'] = chips
    try:
        return list(topologies.get_topology_desc(one, platform='tpu', **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(': ')[2].splitlines()[0]
        raise UserError(f'compile.topology={name!r}: expected a slice such as {_TPU_EXAMPLES}: {reason}') from None
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"compile.topology={name!r}: needs libtpu, expected `pip install 'jaxtune[tpu]'`: {error}"
        ) from None


def _card(name: str, shape: str) -> tuple[Card, int]:
    card, _, count = shape.rpartition('x')
    if card not in CARDS or not re.fullmatch(r'[1-9]\d{0,8}', count):
        raise UserError(f'compile.topology={name!r}: expected cuda:CARDxNUMBER, CARD one of {", ".join(CARDS)}')
    if int(count) > 8 and int(count) % 8:
        raise UserError(f'compile.topology={name!r}: expected at most 8 GPUs, or a multiple of 8 (hosts of 8)')
    return CARDS[card], int(count)


def _cuda(name: str, card: Card, count: int) -> list[Any]:
    hosts = max(1, count // 8)
    try:
        description = topologies.get_topology_desc(
            topology_name=name,
            platform='cuda',
            target_config=target_config(card),
            topology=f'1x{hosts}x{count // hosts}',
        )
    except NotImplementedError:
        raise UserError(
            f"compile.topology={name!r}: needs JAX's CUDA plugin, expected `pip install 'jaxtune[cuda]'`"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f'compile.topology={name!r}: the CUDA plugin refuses it: {str(error).splitlines()[0]}'
        ) from None
    return list(description.devices)


def target_config(card: Card) -> str:
    """XLA's `GpuTargetConfigProto` of a card, as text."""
    shared, threads, units = _MULTIPROCESSOR[card.capability]
    shared *= 1024
    optin = shared - (1024 if card.capability >= (8, 0) else 0)  # the runtime keeps 1 KiB a block
    major, minor = card.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads} core_count: {card.cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth:.0f} l2_cache_size: {card.l2} clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory:.0f} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{card.title}"
"""
