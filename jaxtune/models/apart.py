"""Arithmetic that XLA:CPU should not fuse into what reads its result."""

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxtune.parallel import one_cpu


def apart(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function whose result is written once, before it is read.

    A product's gradient reads an activation transposed. XLA:CPU fuses cheap arithmetic that made the activation into
    that copy, whose strided loop is then ten times slower than a plain transposed copy; a call that is not inlined
    keeps the two apart. It would keep XLA's partitioner out too, so that on a mesh the function is left as it is, as
    on accelerators, where fusing is right.
    """
    if not one_cpu():
        return function

    def called(*arrays: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable='false'):
            return jax.jit(function)(*arrays)

    return called
