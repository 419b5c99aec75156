"""Plug-ins by name: shipped ones, imported at first use, and the user's own as `module:NAME`."""

import importlib
from collections.abc import Mapping
from typing import Generic, TypeVar

from jaxtune.common import imports
from jaxtune.errors import UserError, shown

T = TypeVar('T')


class Registry(Generic[T]):
    """The plug-ins of one kind.

    Args:
      key: the recipe's key that names one, for messages.
      kind: their class.
      places: name -> `module:ATTRIBUTE` of the shipped ones.
    """

    def __init__(self, key: str, kind: type[T], places: Mapping[str, str]) -> None:
        self.key, self.kind, self.places = key, kind, dict(places)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the shipped ones."""
        return tuple(self.places)

    def get(self, name: str) -> T:
        """The plug-in of a name, or the user's own that `module:NAME` or `file.py:NAME` names.

        Raises:
          UserError: there is none, its module fails when it is imported, or it is something else.
        """
        if name in self.places:
            module, attribute = self.places[name].split(':')
            return getattr(importlib.import_module(module), attribute)
        if ':' not in name:
            expected = f'one of {", ".join(self.names)}, or module:NAME of your own'
            raise UserError(f'{self.key}={shown(name)}: expected {expected}')
        plugin = imports.import_from_string(self.key, name)
        if not isinstance(plugin, self.kind):
            raise UserError(
                f'{self.key}={name}: expected a jaxtune {self.kind.__name__}, found {type(plugin).__name__}'
            )
        return plugin
