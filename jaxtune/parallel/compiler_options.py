"""Options for XLA's compilers where a default is not the fastest: all of them, with what each was seen to do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from jaxtune.parallel.mesh import platform

Options = dict[str, str | bool]

# XLA:CPU gives matrix products and reductions to YNNPACK. Its products are slower than those of Eigen, which calls
# oneDNN's kernels: by a tenth where many tokens meet a kernel, by a third and more in attention's small products.
_CPU: Options = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}

# Seconds by libtpu 0.0.42's own estimate, full training of an 8-billion-parameter Llama on v5e:4x4.
_TPU: Options = {
    # Products with divided kernels are not cut into loops over their parts, whose sums are rounded once a part, 16
    # times: 2.28 -> 1.80 s. The gathers run beside other work all the same.
    'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000',
    # Collectives may run beside several products, all-reduces too: 1.80 -> 1.64 s.
    'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': 'true',
    'xla_enable_async_all_reduce': 'true',
}


def compiler_options(mesh: Mesh | None = None) -> Options:
    """What to give `jax.jit` as `compiler_options` for a program that will run where the mesh that is set says.

    Args:
      mesh: that mesh with its devices, which need not be there; without it, options for TPUs are left out.
    """
    where = platform()
    if where == 'cpu':
        return _known(tuple(_CPU.items()), None)
    if where == 'tpu' and mesh is not None:
        return _known(tuple(_TPU.items()), mesh.devices.flat[0])
    return {}


@functools.cache
def _known(options: tuple[tuple[str, Any], ...], device: Any) -> Options:
    """Those of the options that this XLA has: they are experimental, and an unknown one is an error."""
    sharding = None if device is None else SingleDeviceSharding(device)
    lowered = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding))

    def known(name: str, value: Any) -> bool:
        try:
            lowered.compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options if known(name, value)}
