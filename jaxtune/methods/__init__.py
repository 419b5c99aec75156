"""Tuning methods: functions from parameter tree to parameter tree. A new one is a module here and a line below.

A method is a module with `init(params, config, rng) -> params`, `trains(path) -> bool` and `merge(params) -> params`.
"""

import importlib
from types import ModuleType

from jaxtune.errors import UserError

METHODS = {'full': 'jaxtune.methods.full'}


def get(name: str) -> ModuleType:
    """The module of a method.

    Raises:
      UserError: this version does not have it.
    """
    if name not in METHODS:
        raise UserError(f'method.name={name!r}: not in this version; expected one of {", ".join(METHODS)}')
    return importlib.import_module(METHODS[name])
