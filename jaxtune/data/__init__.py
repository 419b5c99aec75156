"""From text to batches: documents, tokenizers, memory-mapped tokens, rows, and the loader that orders them."""

import importlib
from typing import Any

_HOMES = {'Loader': 'loader', 'Prefetch': 'loader', 'Tokens': 'tokens', 'open_tokens': 'cache'}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # On demand: the workers that prepare data need neither JAX nor Grain, which are slow to import and large.
    if name in _HOMES:
        return getattr(importlib.import_module(f'jaxtune.data.{_HOMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
