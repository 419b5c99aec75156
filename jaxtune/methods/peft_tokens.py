"""Rows of added tokens in PEFT's format: `trainable_token_indices`, and a tensor of rows for every table.

PEFT holds rows of a base that has them: `resize_token_embeddings` comes before the adapter is loaded.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError, shown
from jaxtune.methods import new_tokens
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry
from jaxtune.weights import NewRows
from jaxtune.weights.tree import nested

FIELD = 'trainable_token_indices'
_WRAPPER = '.token_adapter.'
_ROWS = f'{_WRAPPER}trainable_tokens_delta'
_TABLE = f'{_WRAPPER}base_layer.weight'  # the resized table, which PEFT writes beside the rows

# Path of a table -> its rows, and the tokens that they are.
Rows = Mapping[str, tuple[tuple[int, ...], np.ndarray]]


def fields_and_rows(leaves: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an adapter's config says of new rows, and these rows by the names of their tensors; both {} without any."""
    names = new_tokens.table_names(model)
    found = {names[path]: leaf for path, leaf in leaves.items() if isinstance(leaf, NewRows)}
    if not found:
        return {}, {}
    fields = {FIELD: {name: list(leaf.ids) for name, leaf in found.items()}}
    return fields, {f'{name}{_ROWS}': leaf.rows for name, leaf in found.items()}


def read(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model, vocab_size: int
) -> tuple[Rows, dict[str, Entry]]:
    """`(rows, others)`: an adapter's rows of tokens, and its tensors without them.

    Args:
      folder: of the adapter, for messages.
      config: the adapter's.
      entries: its tensors, by name without PEFT's prefix.
      model: the model.
      vocab_size: rows of the base; further ones must be here.

    Raises:
      UserError: rows of another model, or what is one table here is changed in several ways.
    """
    others = {name: entry for name, entry in entries.items() if _WRAPPER not in name}
    rows: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    for name, entry in entries.items():
        if not name.endswith(_ROWS):
            continue
        module = name.removesuffix(_ROWS)
        path = _path(folder, module, model)
        ids, values = indices(folder, config, module), entry.read().astype(np.float32)
        if values.shape != (len(ids), model.config.d_model):
            raise UserError(
                f'{folder}: an adapter for another base: rows of {module} are {list(values.shape)}; expected '
                f'[{len(ids)}, {model.config.d_model}]'
            )
        one = _completed(folder, ids, values, entries.get(f'{module}{_TABLE}'), vocab_size)
        if path in rows and not (rows[path][0] == one[0] and np.array_equal(rows[path][1], one[1])):
            raise UserError(f'{folder}: {FIELD} changes {module} apart from its table; they are one here')
        rows[path] = one
    return rows, others


def tokens(config: Mapping[str, Any]) -> set[int]:
    """The tokens whose rows an adapter holds, by its config."""
    given = config.get(FIELD) or {}
    lists = given.values() if isinstance(given, Mapping) else [given]
    return {token for tokens in lists for token in tokens}


def indices(folder: pathlib.Path, config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The tokens whose rows an adapter holds for a module; a name stands for all modules that end so.

    Raises:
      UserError: the config does not name any.
    """
    given = config.get(FIELD) or {}
    if not isinstance(given, Mapping):
        return tuple(given)
    lists = [tokens for name, tokens in given.items() if module.endswith(name)] or list(given.values())
    if not lists:
        raise UserError(f'{folder}: holds rows of {module}, and {FIELD} names no token')
    return tuple(lists[0])


def _path(folder: pathlib.Path, module: str, model: Model) -> str:
    """The table that a module of a folder is here: the one that it shares, where it has none of its own."""
    places = {name: path for path, name in new_tokens.table_names(model).items()}
    if model.tie:
        places[model.tie.name.removesuffix('.weight')] = model.tie.table
    if model.kind == 'encdec':
        places |= dict.fromkeys(('encoder.embed_tokens', 'decoder.embed_tokens'), 'shared/embedding')
    if module not in places:
        raise UserError(f'{folder}: an adapter for another base: it holds rows of {module}, which is no table here')
    return places[module]


def _completed(
    folder: pathlib.Path, ids: tuple[int, ...], values: np.ndarray, table: Entry | None, vocab_size: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """Rows by ascending id, with those between that the base lacks and the adapter's own table has."""
    if len(set(ids)) < len(ids):
        raise UserError(f'{folder}: {FIELD}={shown(list(ids))}: expected each token once')
    rows = dict(zip(ids, values, strict=True))
    lacking = [token for token in range(vocab_size, max(ids) + 1) if token not in rows]
    if lacking and (table is None or table.shape[0] <= lacking[-1]):
        raise UserError(
            f'{folder}: {FIELD}: its base had rows for the tokens {shown(lacking)}, which neither {vocab_size} rows '
            'here nor the adapter hold; expected model.path to be that base'
        )
    if lacking and table is not None:
        whole = table.read().astype(np.float32)
        rows |= {token: whole[token] for token in lacking}
    order = tuple(sorted(rows))
    return order, np.stack([rows[token] for token in order])


def put(params: Any, ids: Mapping[str, tuple[int, ...]], rows: Mapping[str, Any]) -> Any:
    """The tree with rows beside the tables at these paths; traced."""
    leaves = leaf_paths(params)
    for path, values in rows.items():
        leaves[path] = NewRows(leaves[path], jnp.asarray(values), ids[path], new_tokens.axis_of(path))
    return nested(leaves)


def readme(leaves: Mapping[str, Any], model: Model, base: str) -> str:
    """How PEFT loads an adapter with new rows, as the text of a `README.md`; '' for one without."""
    found = [(leaf, new_tokens.axis_of(path)) for path, leaf in leaves.items() if isinstance(leaf, NewRows)]
    if not found:
        return ''
    kinds = {'decoder': 'CausalLM', 'encdec': 'Seq2SeqLM', 'encoder': 'MaskedLM'}
    end = next(
        (kind for kind in ('SequenceClassification', 'TokenClassification') if model.architecture.endswith(kind)),
        kinds[model.kind],
    )
    resize = resizing(leaves)
    lines = [
        '# An adapter with rows of added tokens',
        '',
        f'It trained rows of {len(found[0][0].ids):,} tokens beside a frozen base (PEFT: `{FIELD}`). '
        + ('PEFT holds rows of a base that has them, so the base is resized first:' if resize else 'With PEFT:'),
        '',
        '    from peft import PeftModel',
        f'    from transformers import AutoModelFor{end}',
        '',
        f'    model = AutoModelFor{end}.from_pretrained({base!r})',
        *([f'    {resize}'] if resize else []),
        "    model = PeftModel.from_pretrained(model, 'THIS FOLDER')",
    ]
    if not model.tie and model.kind == 'encdec':
        lines += ['', '`transformers` ties the head to the embedding when it resizes: load the merged model instead.']
    if 'lm_head/bias' in model.tensors:
        lines += ['', "PEFT (0.21) leaves out the head's bias where it wraps it: load the merged model instead."]
    return '\n'.join(lines) + '\n'


def resizing(leaves: Mapping[str, Any]) -> str:
    """The line that resizes a base in `transformers` so that PEFT can load the adapter; '' where none is needed."""
    for path, leaf in leaves.items():
        if isinstance(leaf, NewRows) and leaf.shape[new_tokens.axis_of(path)] > leaf.base.shape[leaf.axis]:
            return f'model.resize_token_embeddings({leaf.shape[leaf.axis]})'
    return ''
