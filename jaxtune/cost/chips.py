"""What a chip can do a second: products, memory, links. Published figures, and what of them programs reach."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.parallel import compiler_options, hardware
from jaxtune.parallel.topology import CARDS

# Clock in Hz, HBM bytes a second, bytes a second of a chip's links in one direction: cloud.google.com/tpu/docs,
# "System architecture". What a program sees as a device is half a chip of v2, v3, v4 and tpu7x.
_TPU = {
    'TPU v2': (0.7e9, 700e9, 248e9),
    'TPU v3': (0.94e9, 900e9, 328e9),
    'TPU v4': (1.05e9, 1228e9, 300e9),
    'TPU v5 lite': (1.5e9, 819e9, 200e9),
    'TPU v5': (1.75e9, 2765e9, 600e9),
    'TPU v6 lite': (1.75e9, 1640e9, 448e9),
    'TPU7x': (1.9e9, 7370e9, 1200e9),
}

# Bytes a second in one direction between GPUs of a host: NVLink's half of the published sum, else PCIe 4 x16.
_NVLINK = {'A100': 300e9, 'H100': 450e9, 'H200': 450e9, 'B200': 900e9}
_PCIE = 25e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do.

    Attributes:
      kind: as JAX names it.
      platform: `tpu`, `cuda` or `cpu`.
      peak: FLOPs a second of bfloat16 products; of float32 on a CPU.
      bandwidth: bytes a second of its memory.
      link: bytes a second that it sends to other devices.
      clock: cycles a second, of the compiler's own estimates (TPU).
      product_share: share of the peak that a large product reaches.
      memory_share: share of the bandwidth that a large copy reaches.
      launch: seconds that a kernel takes at least.
    """

    kind: str
    platform: str
    peak: float
    bandwidth: float
    link: float
    clock: float = 0.0
    product_share: float = 1.0
    memory_share: float = 1.0
    launch: float = 0.0

    def product_seconds(self, flops: float, dtype: str) -> float:
        """Seconds of a product of matrices of a type: float32 on a GPU at half of the peak, eight bits at twice it.

        Eight bits count so where the device multiplies them.
        """
        speed = {'f32': 1.0 if self.platform == 'cpu' else 0.5, 'f64': 1 / 16}.get(dtype, 1.0)
        numbers = 'fp8' if dtype.startswith('f8') else 'int8' if dtype in ('s8', 'u8') else ''
        if numbers and hardware.multiplies(self.kind, numbers):
            speed = 2.0
        return flops / (self.peak * self.product_share * speed)

    def memory_seconds(self, nbytes: float) -> float:
        """Seconds to read or write so many bytes."""
        return nbytes / (self.bandwidth * self.memory_share)


def chip_of(device: Any) -> Chip | None:
    """What a `jax.Device` can do, present or not; None where that is not known."""
    kind = device.device_kind
    if device.platform == 'cpu':
        return _cpu()
    peak = hardware.published_peak(kind)
    if device.platform == 'tpu':
        known = next((_TPU[name] for name in sorted(_TPU, key=len, reverse=True) if kind.startswith(name)), None)
        if known is None or peak is None:
            return None
        cores = 2 if kind.startswith(('TPU v2', 'TPU v3', 'TPU v4', 'TPU7x')) else 1
        clock, bandwidth, link = known
        return Chip(kind, 'tpu', peak / cores, bandwidth / cores, link / cores, clock, 0.8, 0.9)
    card = next((card for card in CARDS.values() if kind == card.title), None)
    if card is None or peak is None:
        return None
    link = next((speed for name, speed in _NVLINK.items() if name in kind), _PCIE)
    # Large products of cuBLAS and Triton reach some 70 % of what is published, where the clock is held by power.
    return Chip(kind, 'cuda', peak, card.bandwidth, 0.8 * link, 0.0, 0.7, 0.88, 2e-6)


@functools.cache
def _cpu() -> Chip:
    return Chip('cpu', 'cpu', hardware.cpu_peak(), _cpu_bandwidth(), _cpu_bandwidth() / 2)


@functools.cache
def _cpu_bandwidth(seconds: float = 0.2) -> float:
    """Bytes a second of reading and writing a large array on this machine, measured once."""
    x = jax.device_put(jnp.ones(2**25, jnp.float32), jax.local_devices(backend='cpu')[0])
    scale = jax.jit(lambda x: x * 1.5, compiler_options=compiler_options())
    scale(x).block_until_ready()
    best, end = float('inf'), time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        scale(x).block_until_ready()
        best = min(best, time.perf_counter() - now)
    return 2 * x.nbytes / best
