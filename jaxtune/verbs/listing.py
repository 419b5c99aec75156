"""`jaxtune recipes` and `jaxtune keys [PART]`: what there is to choose from."""

import textwrap
from collections.abc import Sequence

from jaxtune.config import SCHEMA, Key
from jaxtune.errors import UserError
from jaxtune.recipe import shipped
from jaxtune.recipe.aliases import nearest

_WIDTH = 80


def recipes(words: Sequence[str]) -> None:
    """Prints the shipped recipes, a line each.

    Raises:
      UserError: words follow the verb.
    """
    if words:
        raise UserError(f'jaxtune recipes: expected nothing after it, not {words[0]!r}')
    names = shipped.names()
    indent = max(map(len, names)) + 2
    for name in names:
        print(columns(name, shipped.about(name), indent))


def keys(words: Sequence[str]) -> None:
    """Prints the keys whose names hold a part: default and meaning.

    Raises:
      UserError: no key does.
    """
    part = words[0] if words else ''
    found = {path: key for path, key in SCHEMA.items() if part in path}
    if not found:
        near = nearest(part)
        raise UserError(f'jaxtune keys {part}: no key has this in its name' + (f'; nearest: {near}' if near else ''))
    for path, key in found.items():
        print(f'{path}={key.default!r}' if isinstance(key, Key) else f'{path}.*')
        print(textwrap.fill(key.comment, _WIDTH, initial_indent='    ', subsequent_indent='    '))


def columns(name: str, text: str, indent: int) -> str:
    """A name and what it is beside it, 80 columns wide."""
    lines = textwrap.wrap(text, _WIDTH - indent) or ['']
    return f'{name:<{indent}}' + f'\n{" " * indent}'.join(lines)
