"""The machine a run is on: what it is, and how many FLOPs it could do."""

import functools
import os
import pathlib
import platform
import subprocess
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from jaxtune.parallel import compiler_options

# Published dense bfloat16 FLOPs a second with float32 sums, of a whole TPU chip or GPU. The first entry that
# `device_kind` starts with counts.
PEAK_FLOPS = {
    'TPU v2': 45e12,
    'TPU v3': 123e12,
    'TPU v4 lite': 138e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,  # v5p
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 2307e12,
    'NVIDIA A100': 312e12,
    'NVIDIA A10G': 70e12,
    'NVIDIA A10': 125e12,
    'NVIDIA A40': 149.7e12,
    'NVIDIA L40S': 362e12,
    'NVIDIA L40': 181e12,
    'NVIDIA L4': 121e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
    'NVIDIA GH200': 989e12,
    'NVIDIA GB200': 2500e12,
    'NVIDIA B200': 2250e12,
    'NVIDIA GeForce RTX 3090': 71e12,
    'NVIDIA GeForce RTX 4090': 165.2e12,
    'NVIDIA GeForce RTX 5090': 209.5e12,
    'AMD Instinct MI300X': 1307e12,
}


# Devices whose published peak in eight bits is twice that in bfloat16.
_AMD, _ADA = ('AMD Instinct MI300X',), ('NVIDIA L40', 'NVIDIA L4', 'NVIDIA GeForce RTX 4090')
_NEWER = ('NVIDIA H100', 'NVIDIA H200', 'NVIDIA GH200', 'NVIDIA B200', 'NVIDIA GB200', 'NVIDIA GeForce RTX 5090')
_TWICE = {
    'fp8': ('TPU7x', *_NEWER, *_ADA, *_AMD),
    'int8': ('TPU v5', 'TPU v6', 'NVIDIA A100', 'NVIDIA A10', 'NVIDIA A40', *_NEWER, *_ADA, *_AMD),
}


def multiplies(kind: str, numbers: str) -> bool:
    """Whether a `device_kind` is known to multiply `fp8` or `int8` numbers at twice the speed of bfloat16."""
    return kind.startswith(_TWICE[numbers])


def published_peak(kind: str) -> float | None:
    """Peak dense bfloat16 FLOPs a second of one chip of a `device_kind`; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if kind.lower().startswith(name.lower())), None)


def chips(devices: Sequence[Any]) -> int:
    """Chips among devices: some TPU generations show each of the two cores of a chip as a device of its own."""
    if devices[0].platform != 'tpu':
        return len(devices)
    return len({(getattr(device, 'slice_index', 0), *device.coords) for device in devices})


@functools.cache
def cpu_peak(seconds: float = 0.2) -> float:
    """FLOPs a second of a large float32 matrix product on this machine's cores, measured once."""
    best = float('inf')

    def measure() -> None:
        nonlocal best
        n = 1024
        x = jnp.ones((n, n), jnp.float32)
        product = jax.jit(jnp.matmul, compiler_options=compiler_options())
        product(x, x).block_until_ready()
        end = time.perf_counter() + seconds
        while (now := time.perf_counter()) < end:
            product(x, x).block_until_ready()
            best = min(best, (time.perf_counter() - now) / (2 * n**3))

    # A new thread knows no mesh; under one, every virtual device would do the same product and share the cores.
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return 1 / best


def peak_flops() -> float | None:
    """FLOPs a second of all devices together at their best; None where that is not known."""
    devices = jax.devices()
    if devices[0].platform == 'cpu':
        # Virtual devices of one process share its cores, and one of them alone can use them all.
        return cpu_peak() * jax.process_count()
    peak = published_peak(devices[0].device_kind)
    return None if peak is None else peak * chips(devices)


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:
        lines = []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def describe() -> dict:
    """Devices, processor and memory."""
    devices = jax.devices()
    limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
    return {
        'platform': devices[0].platform,
        'device_kind': devices[0].device_kind,
        'devices': len(devices),
        'processes': jax.process_count(),
        'device_bytes': limit,
        'cpu': cpu_model(),
        'cores': cpu_cores(),
        'memory_bytes': psutil.virtual_memory().total,
        'system': f'{platform.system()} {platform.machine()}',
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers; `commit` is that of the checkout that the package runs from."""
    by_name = {'python': platform.python_version()}
    for name in ('jaxtune', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'numpy'):
        try:
            by_name[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        by_name['commit'] = commit
    return by_name


def _commit() -> str:
    """The commit of the checkout, with `+` where files differ from it; '' outside of one."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / '.git').exists():
        return ''

    def git(*words: str) -> str:
        command = ['git', '-C', str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return git('rev-parse', '--short=12', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.SubprocessError):
        return ''
