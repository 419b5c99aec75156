"""LoRA: low-rank updates of chosen weights train, all else is frozen (Hu et al. 2021, arXiv:2106.09685).

Variants: rsLoRA's scale (Kalajdzievski 2023, arXiv:2312.03732), DoRA's magnitudes (Liu et al. 2024, arXiv:2402.09353),
LoRA+'s faster `b` (Hayou et al. 2024, arXiv:2402.12354), and beginnings other than zero: PiSSA's, the weight's largest
singular vectors (Meng et al. 2024, arXiv:2404.02948), and LoftQ's, those of what quantisation lost (Li et al. 2023,
arXiv:2310.08659; its first iteration, which leaves the quantised base as it is).

Which weights get factors, and their beginnings; the forward pass is that of the leaf, `weights.lora`.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.methods import Method, lora_peft
from jaxtune.methods import targets as select_targets
from jaxtune.methods.lora_init import chosen_layers, loftq_init, principal_factors
from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights import LoRA, materialise
from jaxtune.weights.tree import nested

_TRAINED = re.compile(r'/(kernel|embedding)/(a|b|magnitude)$')


def check(settings: Settings) -> None:
    """Refuses settings that do not go together.

    Raises:
      UserError: names the key.
    """
    if settings.init == 'loftq' and settings.name != 'qlora':
        raise UserError('method.init=loftq: makes up for quantisation; expected method.name=qlora')
    if settings.init == 'pissa' and settings.name == 'qlora':
        raise UserError('method.init=pissa: expected method.init=loftq or default with method.name=qlora')
    if settings.init != 'default' and settings.dora:
        raise UserError(f'method.dora=True: expected method.init=default with it, not {settings.init}')


def init(params: Any, model: Model, settings: Settings, rng: jax.Array, tokenizer: Any = None) -> Any:
    """The tree with a `LoRA` leaf around every targeted weight.

    Raises:
      UserError: no weight is targeted, or a rank is larger than a matrix; names the key.
    """
    leaves = leaf_paths(params)
    names = select_targets.modules(model)
    for path, numbers in select_targets.select(model, settings.targets, settings.layers).items():
        if path not in leaves:  # such as a head that trains whole
            continue
        layers = select_targets.of_layers(model, path, names[path])
        leaves[path] = _wrap(path, leaves[path], [layers[i] for i in numbers], numbers, settings, rng)
    return nested(leaves)


def _wrap(
    path: str, base: Any, layers_names: list[tuple[str, ...]], numbers: tuple[int, ...], settings: Settings, rng: Any
) -> LoRA:
    stack, (inputs, outputs) = base.shape[:-2], base.shape[-2:]
    shared = len(stack) > 1 and settings.share_experts
    if shared and (settings.dora or settings.init != 'default'):
        raise UserError('method.share_experts=True: expected method.dora=False, method.init=default')
    if settings.dora and len(stack) > 1 and len(layers_names[0]) == 1:
        raise UserError(
            f'method.dora=True: {layers_names[0][0]} holds all experts of a layer, of which PEFT has no DoRA; '
            'expected method.dora=False, or other method.targets'
        )
    # Experts that lie in one tensor have one name.
    each = stack[1:] if not shared else ()
    named = [name for layer in layers_names for name in (layer[:1] if shared else layer)]
    names = [name for name in named for _ in range(math.prod((len(numbers), *each)) // len(named))]
    ranks = [rank_of(name, settings) for name in names]
    for name, rank in zip(names, ranks, strict=True):
        if not 1 <= rank <= min(inputs, outputs):
            raise UserError(
                f'method.rank={rank}: expected 1 to {min(inputs, outputs)} for {name}, which is {inputs} x {outputs}'
            )
    scales = [scale_of(rank, settings) for rank in ranks]
    layers = numbers if stack and len(numbers) < stack[0] else None
    count, rank = stack and (len(numbers), *each), max(ranks)
    embedding = path.endswith('embedding')
    if embedding and (settings.dora or settings.init != 'default'):
        raise UserError(f'method.targets: {names[0]} is an embedding; expected method.dora=False, method.init=default')

    keep = np.arange(rank) < np.reshape(ranks, (*count, 1))  # [*layers, rank]
    key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
    if embedding:  # as PEFT: the looked-up rows begin at zero, not the product's second factor
        a = jnp.zeros((*count, inputs, rank), jnp.float32)
        b = jax.random.normal(key, (*count, rank, outputs), jnp.float32) * keep[..., None]
    else:
        bound = inputs**-0.5  # torch's kaiming_uniform with a = sqrt(5)
        a = jax.random.uniform(key, (*count, inputs, rank), jnp.float32, -bound, bound) * keep[..., None, :]
        b = jnp.zeros((*count, rank, outputs), jnp.float32)
    scale = jnp.reshape(jnp.asarray(scales, jnp.float32), count)
    leaf = LoRA(base, a, b, scale, dropout=settings.dropout, layers=layers, shared=shared)
    if settings.dora:
        wide = chosen_layers(materialise(base), layers)
        return dataclasses.replace(leaf, magnitude=jnp.sqrt(jnp.square(wide.astype(jnp.float32)).sum(-2)))
    if settings.init == 'pissa':
        a, b = principal_factors(chosen_layers(materialise(base), layers), rank, keep, scale)
        return dataclasses.replace(leaf, a=a, b=b, a_start=a, b_start=b)
    return leaf


def rank_of(name: str, settings: Settings) -> int:
    """The rank of a module: that of the first pattern which its name ends with, else `method.rank`."""
    for pair in filter(None, settings.ranks.split(',')):
        pattern, _, rank = pair.partition('=')
        if any(re.fullmatch(rf'(.*\.)?({pattern})', form) for form in select_targets.forms(name)):
            return int(rank)
    return settings.rank


def scale_of(rank: int, settings: Settings) -> float:
    """`alpha / rank`, or with rsLoRA `alpha / sqrt(rank)`."""
    return settings.alpha / (rank**0.5 if settings.rslora else rank)


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: the factors, and DoRA's magnitudes."""
    return _TRAINED.search(path) is not None


def rate(path: str, settings: Settings) -> float:
    """LoRA+: factor on the learning rate of `b`."""
    return settings.lr_ratio if path.endswith(('kernel/b', 'embedding/b')) else 1.0


def refine(settings: Settings) -> Callable[[Any, Callable[[str, int], np.ndarray]], Any] | None:
    """With LoftQ, the factors begin as what quantisation lost of the folder's kernels."""
    return loftq_init if settings.init == 'loftq' else None


METHOD = Method(
    name='lora',
    init=init,
    trains=trains,
    check=check,
    refine=refine,
    rate=rate,
    new_rows=True,
    save_adapter=lora_peft.save,
    read_adapter={'LORA': lora_peft.read},
)
