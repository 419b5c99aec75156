"""LoRA: low-rank updates of chosen weights train, all else is frozen (Hu et al. 2021, arXiv:2106.09685).

Variants: rsLoRA's scale (Kalajdzievski 2023, arXiv:2312.03732), DoRA's magnitudes (Liu et al. 2024, arXiv:2402.09353),
LoRA+'s faster `b` (Hayou et al. 2024, arXiv:2402.12354), and beginnings other than zero: PiSSA's, the weight's largest
singular vectors (Meng et al. 2024, arXiv:2404.02948), and LoftQ's, those of what quantisation lost (Li et al. 2023,
arXiv:2310.08659; its first iteration, which leaves the quantised base as it is).
"""

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxtune.errors import UserError
from jaxtune.methods import targets as select_targets
from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights import NF4, LoRA, materialise
from jaxtune.weights.tree import nested

_TRAINED = re.compile(r'/(kernel|embedding)/(a|b|magnitude)$')


def check(config: ConfigDict) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: names the key.
    """
    if config.init == 'loftq' and config.name != 'qlora':
        raise UserError('method.init=loftq: makes up for quantisation; expected method.name=qlora')
    if config.init == 'pissa' and config.name == 'qlora':
        raise UserError('method.init=pissa: expected method.init=loftq or default with method.name=qlora')
    if config.init != 'default' and config.dora:
        raise UserError(f'method.dora=True: expected method.init=default with it, not {config.init}')


def init(params: Any, model: Model, config: ConfigDict, rng: jax.Array) -> Any:
    """The tree with a `LoRA` leaf around every targeted weight.

    Raises:
      UserError: no weight is targeted, or a rank is larger than a matrix; names the key.
    """
    leaves = leaf_paths(params)
    names = select_targets.modules(model)
    for path, numbers in select_targets.select(model, config.targets, config.layers).items():
        if path not in leaves:  # such as a head that trains whole
            continue
        leaves[path] = _wrap(path, leaves[path], [names[path][i] for i in numbers], numbers, config, rng)
    return nested(leaves)


def _wrap(path: str, base: Any, names: list[str], numbers: tuple[int, ...], config: ConfigDict, rng: jax.Array) -> LoRA:
    stack, (inputs, outputs) = base.shape[:-2], base.shape[-2:]
    ranks = [rank_of(name, config) for name in names]
    for name, rank in zip(names, ranks, strict=True):
        if not 1 <= rank <= min(inputs, outputs):
            raise UserError(
                f'method.rank={rank}: expected 1 to {min(inputs, outputs)} for {name}, which is {inputs} x {outputs}'
            )
    scales = [scale_of(rank, config) for rank in ranks]
    layers = numbers if stack and len(numbers) < stack[0] else None
    count, rank = stack and (len(numbers),), max(ranks)
    embedding = path.endswith('embedding')
    if embedding and (config.dora or config.init != 'default'):
        raise UserError(f'method.targets: {names[0]} is an embedding; expected method.dora=False, method.init=default')

    keep = np.arange(rank) < np.asarray(ranks)[:, None]  # [layers, rank]
    keep = keep if stack else keep[0]
    key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
    if embedding:  # as PEFT: the looked-up rows begin at zero, not the product's second factor
        a = jnp.zeros((*count, inputs, rank), jnp.float32)
        b = jax.random.normal(key, (*count, rank, outputs), jnp.float32) * keep[..., None]
    else:
        bound = inputs**-0.5  # torch's kaiming_uniform with a = sqrt(5)
        a = jax.random.uniform(key, (*count, inputs, rank), jnp.float32, -bound, bound) * keep[..., None, :]
        b = jnp.zeros((*count, rank, outputs), jnp.float32)
    scale = jnp.asarray(scales if stack else scales[0], jnp.float32)
    leaf = LoRA(base, a, b, scale, dropout=config.dropout, layers=layers)
    if config.dora:
        wide = _chosen(materialise(base), layers)
        return dataclasses.replace(leaf, magnitude=jnp.sqrt(jnp.square(wide.astype(jnp.float32)).sum(-2)))
    if config.init == 'pissa':
        a, b = _principal(_chosen(materialise(base), layers), rank, keep, scale)
        return dataclasses.replace(leaf, a=a, b=b, a_start=a, b_start=b)
    return leaf


def begun(leaf: LoRA, how: str) -> LoRA:
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
    wide = _chosen(leaf.base, leaf.layers).astype(jnp.float32)
    rank, scale = leaf.a.shape[-1], jnp.asarray(leaf.scale)
    keep = (jnp.abs(leaf.a).max(-2) > 0).astype(jnp.float32)  # a smaller rank than the stack's is filled with zeros
    if how == 'pissa':
        a, b = _principal(wide, rank, keep, scale)
    else:
        q, r = jnp.linalg.qr(wide.swapaxes(-1, -2))
        a, b = (r[..., :rank, :] * keep[..., None]).swapaxes(-1, -2), q[..., :rank].swapaxes(-1, -2)
    return dataclasses.replace(leaf, a_start=a, b_start=b)


def _chosen(wide: jax.Array, layers: tuple[int, ...] | None) -> jax.Array:
    return wide if layers is None else wide[jnp.asarray(layers)]


def _principal(
    wide: jax.Array, rank: int, keep: np.ndarray | jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors `a [.., in, rank]`, `b [.., rank, out]` whose scaled product is the best of that rank."""
    u, s, v = jnp.linalg.svd(wide.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale[..., None]) * keep
    return u[..., :rank] * root[..., None, :], v[..., :rank, :] * root[..., :, None]


def make_up(params: Any, read: Callable[[str, int], np.ndarray]) -> Any:
    """LoftQ: factors of what quantisation took from every targeted weight, one layer after the other.

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
            one = jax.tree.map(lambda x, row=row: x[row], (leaf.a, leaf.scale)) if stacked else (leaf.a, leaf.scale)
            base = jax.tree.map(lambda x, number=number: x[number], leaf.base) if stacked else leaf.base
            factors.append(_of_what_is_lost(read(path, number), base, *one))
        a, b = (jnp.stack(parts) if stacked else parts[0] for parts in zip(*factors, strict=True))
        a, b = jax.device_put((a, b), (leaf.a.sharding, leaf.b.sharding))
        leaves[path] = dataclasses.replace(leaf, a=a, b=b)
    return nested(leaves)


@jax.jit
def _of_what_is_lost(weight, base: NF4, a, scale):
    keep = (jnp.abs(a).max(-2) > 0).astype(jnp.float32)
    return _principal(weight - base.materialise().astype(jnp.float32), a.shape[-1], keep, scale)


def rank_of(name: str, config: ConfigDict) -> int:
    """The rank of a module: that of the first pattern which its name ends with, else `method.rank`."""
    for pair in filter(None, config.ranks.split(',')):
        pattern, _, rank = pair.partition('=')
        if re.fullmatch(rf'(.*\.)?({pattern})', name):
            return int(rank)
    return config.rank


def scale_of(rank: int, config: ConfigDict) -> float:
    """`alpha / rank`, or with rsLoRA `alpha / sqrt(rank)`."""
    return config.alpha / (rank**0.5 if config.rslora else rank)


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: the factors, and DoRA's magnitudes."""
    return _TRAINED.search(path) is not None


def rate(path: str, config: ConfigDict) -> float:
    """LoRA+: factor on the learning rate of `b`."""
    return config.lr_ratio if path.endswith(('kernel/b', 'embedding/b')) else 1.0


def merge(params: Any) -> Any:
    """Plain arrays, updates added: from NF4, to the dequantised weights that the update was trained against."""

    def plain(node):
        if isinstance(node, dict):
            return {name: plain(part) for name, part in node.items()}
        return _materialised(node) if isinstance(node, LoRA | NF4) else node

    return plain(params)


_materialised = jax.jit(materialise)
