"""Bottleneck adapters: small networks inside every layer train, all else is frozen.

`houlsby`: after the attention and the feed-forward layer (Houlsby et al. 2019, arXiv:1902.00751), in a decoder after
the attention to the source too; `pfeiffer`: after the feed-forward layer only (Pfeiffer et al. 2020, arXiv:2005.00247).
Their projection up begins at zero, so that training begins at the model itself.
"""

import pathlib
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.methods import AdapterArrays, Attach, Method, peft, peft_tokens
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry
from jaxtune.weights.tree import nested

BOTTLENECK = 'JAXTUNE_BOTTLENECK'  # PEFT has no such kind of adapter
_PLACES = ('mlp_adapter', 'attention_adapter', 'cross_adapter')
_STDDEV = 1e-2  # Houlsby et al., section 2.1


def init(params: Any, model: Model, settings: Settings, rng: jax.Array, tokenizer: Any = None) -> Any:
    """The tree with adapters in every block that `method.layers` does not leave out."""
    leaves = leaf_paths(params)
    ending = '/self_attn/o_proj/kernel'
    for path in [path for path in leaves if path.endswith(ending)]:
        block, (*stack, _, width) = path.removesuffix(ending), leaves[path].shape
        for name in _names(leaves, block, settings.placement):
            key = jax.random.fold_in(rng, zlib.crc32(f'{block}/{name}'.encode()))
            down = _STDDEV * jax.random.truncated_normal(key, -2, 2, (*stack, width, settings.bottleneck), jnp.float32)
            added = {
                'down/kernel': down,
                'down/bias': jnp.zeros((*stack, settings.bottleneck), jnp.float32),
                'up/kernel': jnp.zeros((*stack, settings.bottleneck, width), jnp.float32),
                'up/bias': jnp.zeros((*stack, width), jnp.float32),
            }
            leaves |= {f'{block}/{name}/{part}': leaf for part, leaf in added.items()}
    return nested(leaves)


def _names(leaves: Mapping[str, Any], block: str, placement: str) -> list[str]:
    names = ['mlp_adapter']
    if placement == 'houlsby':
        names.append('attention_adapter')
        if f'{block}/cross_attn/o_proj/kernel' in leaves:
            names.append('cross_adapter')
    return names


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: those of adapters."""
    return '_adapter/' in path


def read(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[Attach, AdapterArrays]:
    """Reads an adapter of bottlenecks under their paths; see `peft.reader`."""
    arrays = peft.own_arrays(folder, entries, '_adapter/', model)
    _check_bottlenecks(folder, arrays.added, model)
    return peft.put_in, arrays


def _check_bottlenecks(folder: pathlib.Path, added: Mapping[str, np.ndarray], model: Model) -> None:
    """Refuses arrays that are no whole adapters of this model's blocks."""
    shapes = leaf_paths(model.shapes)
    for path in added:
        if not re.fullmatch(rf'.+/({"|".join(_PLACES)})/(down|up)/(kernel|bias)', path):
            raise peft.wrong_base(folder, f'{path} is no part of an adapter')
    for adapter in sorted({path.rsplit('/', 2)[0] for path in added}):
        block = adapter.rsplit('/', 1)[0]
        kernel = shapes.get(f'{block}/self_attn/o_proj/kernel')
        if kernel is None:
            raise peft.wrong_base(folder, f'this model has no {block}')
        (*stack, _, width), size = kernel.shape, added.get(f'{adapter}/down/bias', np.zeros(0)).shape[-1]
        expected = {
            'down/kernel': (*stack, width, size),
            'down/bias': (*stack, size),
            'up/kernel': (*stack, size, width),
            'up/bias': (*stack, width),
        }
        for part, shape in expected.items():
            value = added.get(f'{adapter}/{part}')
            if value is None:
                raise peft.wrong_base(folder, f'{adapter} has no {part}')
            if value.shape != shape:
                raise peft.wrong_base(folder, f'{adapter}/{part} {list(value.shape)} does not fit, expected {shape}')


def save(
    folder: pathlib.Path, params: Any, model: Model, settings: Settings, base: str, whole: Iterable[str] = ()
) -> None:
    """Writes a tree's bottleneck adapters under their paths; arguments as for `lora_peft.save`."""
    leaves = leaf_paths(params)
    added = {path: peft.host_array(leaf) for path, leaf in leaves.items() if '_adapter/' in path}
    saved = peft.whole_tensors(leaves, whole, model)
    fields = {'peft_type': BOTTLENECK, 'bottleneck': settings.bottleneck, 'placement': settings.placement}
    token_fields, rows = peft.token_rows(leaves, model)
    readme = peft_tokens.readme(leaves, model, base)
    peft.write(folder, fields | token_fields, added | saved | rows, model, base, readme)


METHOD = Method(
    name='adapter',
    init=init,
    trains=trains,
    merges=False,
    new_rows=True,
    save_adapter=save,
    read_adapter={BOTTLENECK: read},
)
