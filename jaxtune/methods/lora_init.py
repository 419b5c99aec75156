"""What LoRA's factors begin as, where not as zero: PiSSA's, OLoRA's and LoftQ's.

PiSSA: the weight's largest singular vectors (Meng et al. 2024, arXiv:2404.02948). LoftQ: those of the quantisation
residual (Li et al. 2023, arXiv:2310.08659; its first iteration, which leaves the quantised base as it is).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.models.model import leaf_paths
from jaxtune.weights import NF4, LoRA, materialise
from jaxtune.weights.tree import nested


def pissa_start(leaf: LoRA, how: str) -> LoRA:
    """A leaf of which PEFT took the beginning off the base, with what it began with: as that follows from the base.

    Args:
      leaf: with trained factors over the base.
      how: `pissa`, or `olora`, the first rows of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775).

    Raises:
      UserError: the base is quantised, and is not what training began with.
    """
    if isinstance(leaf.base, NF4):
        raise UserError(
            f'method.name=qlora: the adapter began as {how} of a base that was not quantised; expected lora'
        )
    wide = chosen_layers(materialise(leaf.base), leaf.layers).astype(jnp.float32)
    rank, scale = leaf.a.shape[-1], jnp.asarray(leaf.scale)
    keep = (jnp.abs(leaf.a).max(-2) > 0).astype(jnp.float32)  # a smaller rank than the stack's is filled with zeros
    if how == 'pissa':
        a, b = principal_factors(wide, rank, keep, scale)
    else:
        q, r = jnp.linalg.qr(wide.swapaxes(-1, -2))
        a, b = (r[..., :rank, :] * keep[..., None]).swapaxes(-1, -2), q[..., :rank].swapaxes(-1, -2)
    return dataclasses.replace(leaf, a_start=a, b_start=b)


def chosen_layers(wide: jax.Array, layers: tuple[int, ...] | None) -> jax.Array:
    """The layers of a stacked weight that a leaf is for."""
    return wide if layers is None else wide[jnp.asarray(layers)]


def principal_factors(
    wide: jax.Array, rank: int, keep: np.ndarray | jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors `a [.., in, rank]`, `b [.., rank, out]` whose scaled product is the best of that rank."""
    u, s, v = jnp.linalg.svd(wide.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale[..., None]) * keep
    return u[..., :rank] * root[..., None, :], v[..., :rank, :] * root[..., :, None]


def loftq_init(params: Any, read: Callable[[str, int], np.ndarray]) -> Any:
    """LoftQ: factors of the quantisation residual of every targeted weight, one layer after the other.

    Args:
      params: the tree with LoRA leaves over NF4 ones.
      read: path and number in the stack -> the weight `[in, out]` before quantisation.
    """
    leaves = leaf_paths(params)
    for path, leaf in leaves.items():
        if not isinstance(leaf, LoRA) or not isinstance(leaf.base, NF4):
            continue
        stacked = leaf.a.ndim > 2
        rows = (leaf.layers or range(leaf.a.shape[0])) if stacked else (0,)
        factors = []
        for row, number in enumerate(rows):
            pair = jax.tree.map(lambda x, row=row: x[row], (leaf.a, leaf.scale)) if stacked else (leaf.a, leaf.scale)
            base = jax.tree.map(lambda x, number=number: x[number], leaf.base) if stacked else leaf.base
            factors.append(_residual_factors(read(path, number), base, *pair))
        a, b = (jnp.stack(parts) if stacked else parts[0] for parts in zip(*factors, strict=True))
        a, b = jax.device_put((a, b), (leaf.a.sharding, leaf.b.sharding))
        leaves[path] = dataclasses.replace(leaf, a=a, b=b)
    return nested(leaves)


@jax.jit
def _residual_factors(weight: jax.Array, base: NF4, a: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    keep = (jnp.abs(a).max(-2) > 0).astype(jnp.float32)
    return principal_factors(weight - base.materialise().astype(jnp.float32), a.shape[-1], keep, scale)
