"""Tuning methods: functions from parameter tree to parameter tree. A new one is a module here and a line below.

A method is a module with

- `init(params, model, config, rng) -> params`: the tree with what the method adds, from the recipe's `method` subtree;
- `trains(path) -> bool`: which leaves train;
- `merge(params) -> params`: plain arrays in the model's own places;

and may hold

- `check(config)`: refuses settings that do not go together, before anything is loaded;
- `codecs(model, config) -> {path: codec}`: how kernels are stored instead of as arrays; they are, while loading;
- `rate(path, config) -> float`: factor on the learning rate of a leaf;
- `MERGES = False`: what it adds cannot be merged into the model, so that no `export/` is written.
"""

import importlib
from types import ModuleType

from jaxtune.errors import UserError

METHODS = {
    'full': 'jaxtune.methods.full',
    'lora': 'jaxtune.methods.lora',
    'qlora': 'jaxtune.methods.qlora',
    'adapter': 'jaxtune.methods.adapter',
    'prompt': 'jaxtune.methods.prompt',
}


def get(name: str) -> ModuleType:
    """The module of a method.

    Raises:
      UserError: this version does not have it.
    """
    if name not in METHODS:
        raise UserError(f'method.name={name!r}: not in this version; expected one of {", ".join(METHODS)}')
    return importlib.import_module(METHODS[name])
