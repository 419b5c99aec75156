"""A person's own function, by its name in a recipe."""

import importlib
from collections.abc import Callable

from jaxtune.errors import UserError


def function(key: str, name: str) -> Callable:
    """The function that `module:function` names.

    Args:
      key: of the recipe, for the message.
      name: its value.

    Raises:
      UserError: there is none.
    """
    module, _, attribute = name.partition(':')
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'{key}={name}: expected module:function: {error}') from None
    if not callable(found):
        raise UserError(f'{key}={name}: expected a function, found {type(found).__name__}')
    return found
