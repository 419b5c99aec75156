"""Options for XLA's compilers where a default is not the fastest."""

import functools

import jax

from jaxtune.parallel.mesh import platform

# XLA:CPU gives matrix products and reductions to YNNPACK. Its products are slower than those of Eigen, which calls
# oneDNN's kernels: by a tenth where many tokens meet a kernel, by a third and more in attention's small products.
_CPU: dict[str, str | bool] = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def compiler_options() -> dict[str, str | bool]:
    """What to give `jax.jit` as `compiler_options` for a program that will run where the mesh says."""
    return _CPU if platform() == 'cpu' and _known() else {}


@functools.cache
def _known() -> bool:
    """Whether this XLA has the options: they are experimental, and an unknown one is an error."""
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options=_CPU)
    except jax.errors.JaxRuntimeError:
        return False
    return True
