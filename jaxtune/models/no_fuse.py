"""Arithmetic that XLA:CPU should not fuse into what reads its result."""

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxtune.parallel import in_order, one_cpu


def no_fuse(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function whose result is written once, in rows, before it is read.

    A transpose is a matter of layout to XLA, and a product's gradient reads an activation transposed. XLA:CPU fuses the
    copy that this takes with cheap arithmetic before or after it, into a strided loop that is ten times slower than a
    plain transposed copy; a call that is not inlined keeps the two apart. It would keep XLA's partitioner out too, so
    that on a mesh the function is left as it is, as on accelerators, where fusing is right.
    """
    if not one_cpu():
        return function

    def in_rows(*arrays: jax.Array) -> jax.Array:
        result = function(*arrays)
        return in_order(result, *range(result.ndim))

    def called(*arrays: jax.Array) -> jax.Array:
        with set_xla_metadata(inlineable='false'):
            return jax.jit(in_rows)(*arrays)

    return called
