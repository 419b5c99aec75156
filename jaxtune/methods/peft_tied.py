"""What an adapter in PEFT's format makes of an embedding that is the model's head as well.

PEFT adapts modules, and table and head are two of them even where they share one weight: an adapter may change one of
them, each in its own way, or both alike. Here they are one leaf, which is changed for both; an adapter that parts them
needs a model with a head of its own (`models.build(own_head=True)`).
"""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.methods import targets
from jaxtune.models.model import Model
from jaxtune.models.safetensors import Entry

# Names of embeddings that PEFT knows: without one among an adapter's modules it ties nothing (as of 0.21).
_KNOWN = ('embed_tokens', 'lm_head')


class Place(NamedTuple):
    """A module that PEFT adapts for a weight of this tree; `flipped`: its weight is the other's transpose."""

    name: str
    flipped: bool = False


def places(model: Model, path: str, name: str) -> list[Place]:
    """The modules that stand for one layer's weight: `name`, but for the table of embeddings.

    An encoder-decoder looks nothing up in `shared`, whose weight both its stacks have as `embed_tokens`.
    """
    modules = [Place(name)]
    if model.kind == 'encdec' and name == 'shared':
        modules = [Place('encoder.embed_tokens'), Place('decoder.embed_tokens')]
    if model.tie and path == model.tie.table:
        modules.append(Place(model.tie.name.removesuffix('.weight'), flipped=True))
    return modules


def ensures(model: Model) -> bool:
    """Whether PEFT itself can keep one weight of table and head (`ensure_weight_tying`)."""
    return model.tie is not None and model.kind == 'decoder'


def change(config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model) -> str:
    """What an adapter does to a weight that is both table and head.

    Args:
      config: the adapter's.
      entries: its tensors, by name without PEFT's prefix.
      model: the model, with one weight for both.

    Returns:
      `''`: nothing; `one`: it changes both alike; `apart`: it parts them.
    """
    if model.tie is None:
        return ''
    (name,) = targets.modules(model)[model.tie.table]
    *tables, head = (_of(entries, place.name) for place in places(model, model.tie.table, name))
    if not any((*tables, head)):
        return ''
    if ensures(model) and config.get('ensure_weight_tying') and _ties(config):
        return 'one'
    return 'one' if all(_alike(table, head) for table in tables) else 'apart'


def as_here(folder: str, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model) -> dict[str, Entry]:
    """An adapter's tensors under the names of this tree: one for what several modules share.

    Raises:
      UserError: they differ where there is one weight here.
    """
    entries, changed = dict(entries), change(config, entries, model)
    if model.kind == 'encdec':
        first, second = (_of(entries, f'{stack}.embed_tokens') for stack in ('encoder', 'decoder'))
        if _of(entries, 'shared'):
            raise UserError(
                f'{folder}: it changes shared, which nothing looks up in PEFT: expected embed_tokens of both stacks'
            )
        if first.keys() != second.keys() or not all(_same(first[part], second[part]) for part in first):
            raise UserError(
                f'{folder}: it changes encoder.embed_tokens and decoder.embed_tokens differently; they are one here'
            )
        entries = {name: entry for name, entry in entries.items() if not name.startswith('decoder.embed_tokens.')}
        entries = {name.replace('encoder.embed_tokens.', 'shared.', 1): entry for name, entry in entries.items()}
    if changed == 'one' and model.tie:
        head = model.tie.name.removesuffix('weight')
        entries = {name: entry for name, entry in entries.items() if not name.startswith(head)}
    return entries


def _of(entries: Mapping[str, Entry], module: str) -> dict[str, Entry]:
    """What an adapter holds of a module, less the old weight that PEFT writes beside an embedding's factors."""
    parts = {name.removeprefix(f'{module}.'): entry for name, entry in entries.items() if name.startswith(f'{module}.')}
    return {part: entry for part, entry in parts.items() if part.startswith('lora_') or part == 'weight'}


def _ties(config: Mapping[str, Any]) -> bool:
    given = config.get('target_modules')
    if isinstance(given, str):
        with contextlib.suppress(re.error):
            if any(targets.matches(name, given) for name in _KNOWN):
                return True
    lists = (value for value in (given, config.get('modules_to_save')) if isinstance(value, list))
    return any(str(name).rsplit('.', 1)[-1] in _KNOWN for names in lists for name in names)


def _alike(table: Mapping[str, Entry], head: Mapping[str, Entry]) -> bool:
    if 'weight' in table or 'weight' in head:
        return table.keys() == head.keys() == {'weight'} and _same(table['weight'], head['weight'])
    pairs = [('lora_embedding_A', 'lora_B.weight'), ('lora_embedding_B', 'lora_A.weight')]
    if set(table) != {pair[0] for pair in pairs} or set(head) != {pair[1] for pair in pairs}:
        return False
    return all(np.array_equal(table[mine].read().T, head[its].read()) for mine, its in pairs)


def _same(one: Entry, other: Entry) -> bool:
    return one.shape == other.shape and np.array_equal(one.read(), other.read())
