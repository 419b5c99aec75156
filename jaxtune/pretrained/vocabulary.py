"""Which tokens of a tokenizer get rows that the model did not have, and which have none."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxtune.common import console, hub
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.tokenizer import Added
from jaxtune.errors import UserError
from jaxtune.methods.new_tokens import NewTokens


def plan(
    tokenizer: Any, added: Iterable[Added], rows: int, held: Iterable[int] = (), folder: str = ''
) -> NewTokens | None:
    """The rows that begin anew: of added tokens that the tokenizer or the model lacked, and those beyond the model.

    Args:
      tokenizer: with the added tokens.
      added: those.
      rows: of the model as its folder has it.
      held: tokens whose rows an adapter holds.
      folder: the model's, whose tokenizer tells which of them are new.

    Raises:
      UserError: a token's number is far beyond the others.
    """
    added, held = tuple(added), set(held)
    ids = {token.id for token in added if not token.known or token.id >= rows}
    size = max((*(i + 1 for i in ids | held), rows))
    taken = _lacked(folder, {i for i in held if i < rows} - ids)
    ids |= set(range(rows, size))
    if not ids and not taken:
        return None
    known = np.asarray(list(tokenizer.get_vocab().values()), np.int64)
    if size - rows > len(known):
        name = tokenizer.convert_ids_to_tokens(size - 1)
        raise UserError(f'tokenizer.add: {name!r} has id {size - 1}, far beyond the {rows} rows of the model')
    used = np.zeros(rows, bool)
    used[known[known < rows]] = True
    used[[i for i in ids | taken if i < rows]] = False
    return NewTokens(size, tuple(sorted(ids)), used, {token.id: token.description for token in added}, tuple(taken))


def _lacked(folder: str, ids: set[int]) -> set[int]:
    """Those ids that the tokenizer in a model's folder does not have; none, where there is no tokenizer."""
    if not ids or not folder:
        return set()
    path = hub.resolve(folder)
    if not any((path / name).is_file() for name in hub.TOKENIZER_FILES):
        return set()
    return ids - set(tokenizers.load(str(path)).get_vocab().values())


def check_scratch(added: Iterable[Added], rows: int) -> None:
    """Refuses a model from scratch that is told to have too few rows; where it is not told, it counts them.

    Raises:
      UserError: names the key.
    """
    size = max((token.id + 1 for token in added), default=0)
    if size > rows:
        raise UserError(f'model.config.vocab_size={rows}: expected >= {size}, for the tokens of tokenizer.add')


def note(tokenizer: Any, before: int, rows: int, new: NewTokens | None) -> None:
    """Says which rows are new, and which tokens have none.

    Args:
      tokenizer: the tokenizer.
      before: rows of the model as its folder has it.
      rows: of the model.
      new: what begins anew because the recipe says so.
    """
    if beyond := tokenizers.check_vocab(tokenizer, rows):
        console.note(
            f'{len(beyond):,} added tokens of the tokenizer, {beyond[0]!r} the first, have no row in the model of '
            f'{rows:,}: a text that holds one is refused (tokenizer.add gives them rows)'
        )
    if new:
        grows = f'grows from {before:,} to {rows:,} rows' if rows > before else f'has room for them in its {rows:,}'
        console.note(f'tokenizer.add: rows of {len(new.ids):,} tokens begin anew; the model {grows}')
