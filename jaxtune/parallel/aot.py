"""Fitting the step into memory: compiled ahead of time, with as many micro-batches as the compiler says are needed."""

import re
from collections.abc import Callable
from typing import Any

import jax
import psutil

from jaxtune.common import console
from jaxtune.errors import UserError


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes a device needs while it runs a compiled function: arguments, outputs not aliased to them, temporaries."""
    memory = compiled.memory_analysis()
    assert memory is not None  # all of XLA's compilers tell
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def available_bytes() -> int:
    """Memory of one device; on the CPU, its share of what the machine has free or holds in this process."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
        return int(stats['bytes_limit'])
    return (psutil.virtual_memory().available + psutil.Process().memory_info().rss) // jax.local_device_count()


def try_compile(lowered: jax.stages.Lowered, limit: int) -> tuple[jax.stages.Compiled | None, int]:
    """Compiles; returns `(compiled, bytes a device needs)`, with None for what XLA refuses for lack of memory.

    XLA's TPU compiler refuses what a chip cannot hold and says how much it would take; on other platforms everything
    compiles.

    Args:
      lowered: a jitted function's lowering.
      limit: bytes a device has.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith('RESOURCE_EXHAUSTED'):
            raise
        return None, max(refused_bytes(str(error)), limit + 1)
    return compiled, peak_bytes(compiled)


def refused_bytes(message: str) -> int:
    """Bytes that a program would take, from the message with which XLA refuses it; 0 where it does not say."""
    match = re.search(r'Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds available', message)
    if not match:
        return 0
    number, unit = match[1] or match[3], match[2] or match[4]
    return int(float(number) * 1024 ** ('KMGT'.index(unit) + 1))


def compile_step(
    make: Callable[[int], Any], args: tuple, accumulate: int | str, rows: int
) -> tuple[int, jax.stages.Compiled]:
    """Traces and compiles once for a given number of micro-batches, or tries 1, 2, 4 … until one fits.

    Args:
      make: number of micro-batches -> jitted function.
      args: what it will be called with (arrays or shapes).
      accumulate: the number, or 'auto'.
      rows: rows of the batch that fall to one device: the most micro-batches there can be.

    Returns:
      `(accumulate, compiled)`.

    Raises:
      UserError: not even one row a micro-batch fits.
    """
    if accumulate != 'auto':
        count = int(accumulate)
        return count, make(count).lower(*args).compile()
    limit, needed = available_bytes(), 0
    for count in (n for n in range(1, rows + 1) if rows % n == 0):
        compiled, needed = try_compile(make(count).lower(*args), limit)
        if compiled is not None and needed <= 0.92 * limit:
            return count, compiled
        console.note(f'train.accumulate={count} needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB a device')
    raise UserError(
        f'train.batch_size: even one row a micro-batch needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB a '
        'device: expected a shorter data.seq_len, model.remat=full, model.param_dtype=bfloat16, or a larger mesh.fsdp'
    )
