"""Tuning methods: functions from parameter tree to parameter tree.

A new one is a module here with a `Method`, and a line in `METHODS`; a recipe may name another as `module:NAME`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxtune.common.registry import Registry

# The names below are a recipe's choices, which are checked before anything slow is imported.
if TYPE_CHECKING:
    import pathlib

    import jax
    import numpy as np

    from jaxtune.common.settings import Settings
    from jaxtune.models.model import Model
    from jaxtune.models.safetensors import Entry
    from jaxtune.weights import Codec


class AdapterArrays(NamedTuple):
    """An adapter's numbers by path: what it adds, the model's own leaves that it brings along whole, rows of tokens."""

    added: Mapping[str, Any]
    whole: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray] | None = None


# `(params, arrays) -> params`: the tree of a base with an adapter.
Attach = Callable[[Any, AdapterArrays], Any]


class ReadAdapter(Protocol):
    """Reads an adapter folder: its config, its tensors by name without PEFT's prefix; for a model."""

    def __call__(
        self, folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
    ) -> tuple[Attach, AdapterArrays]:
        """See the class."""
        ...


class SaveAdapter(Protocol):
    """Writes what a method trained as an adapter folder; `whole` are paths of leaves that were trained whole."""

    def __call__(
        self, folder: pathlib.Path, params: Any, model: Model, settings: Settings, base: str, whole: Iterable[str]
    ) -> None:
        """See the class."""
        ...


def _accept(settings: Settings) -> None:
    return None


def _no_codecs(model: Model, settings: Settings) -> dict[str, Codec]:
    return {}


def _no_refinement(settings: Settings) -> None:
    return None


def _merge(params: Any) -> Any:
    from jaxtune.weights import merge_weights  # slow to import

    return merge_weights(params)


def _no_tokens(settings: Settings) -> int:
    return 0


@dataclasses.dataclass(frozen=True)
class Method:
    """A tuning method. Its functions get the recipe's `method` subtree.

    Attributes:
      name: what a recipe calls it.
      init: `(params, model, settings, rng, tokenizer) -> params`, the tree with what the method adds; traced.
      trains: whether the leaf at a path trains.
      check: refuses settings that do not go together, before anything is loaded.
      codecs: `(model, settings) -> {path: codec}`, how kernels are stored instead of as arrays, from loading on.
      refine: of the settings: `(params, read) -> params`, what looks at the kernels of the model's folder after `init`
        (`read(path, layer)` gives one), or None.
      rate: `(path, settings) -> factor` on the learning rate of a leaf.
      virtual_tokens: how many positions it takes before a text.
      virtual_embeddings: whether these are embeddings, which the first layer reads.
      merge: plain arrays in the model's own places.
      merges: whether that can be; if not, no `export/` is written.
      flops_share: of full training's FLOPs, what a step takes: a frozen kernel has two products instead of three.
      new_rows: whether the rows of added tokens can train beside a frozen model: its adapter holds them, or all trains.
      save_adapter: writes `adapter/`.
      read_adapter: kind of adapter (PEFT's `peft_type`) -> what reads it.
    """

    name: str
    init: Callable[[Any, Model, Settings, jax.Array, Any], Any]
    trains: Callable[[str], bool]
    check: Callable[[Settings], None] = _accept
    codecs: Callable[[Model, Settings], dict[str, Codec]] = _no_codecs
    refine: Callable[[Settings], Callable[[Any, Callable[[str, int], np.ndarray]], Any] | None] = _no_refinement
    rate: Callable[[str, Settings], float] | None = None
    virtual_tokens: Callable[[Settings], int] = _no_tokens
    virtual_embeddings: Callable[[Settings], bool] = lambda settings: False
    merge: Callable[[Any], Any] = _merge
    merges: bool = True
    flops_share: float = 2 / 3
    new_rows: bool = False
    save_adapter: SaveAdapter | None = None
    read_adapter: Mapping[str, ReadAdapter] = dataclasses.field(default_factory=dict)


METHODS = Registry(
    'method.name',
    Method,
    {
        'full': 'jaxtune.methods.full:METHOD',
        'lora': 'jaxtune.methods.lora:METHOD',
        'qlora': 'jaxtune.methods.qlora:METHOD',
        'adapter': 'jaxtune.methods.adapter:METHOD',
        'prompt': 'jaxtune.methods.prompt:METHOD',
    },
)


@dataclasses.dataclass(frozen=True)
class BoundMethod:
    """A method with the settings of a recipe.

    Attributes:
      method: which weights are trained.
      settings: the recipe's `method` subtree.
      seed: of what it adds.
    """

    method: Method
    settings: Settings
    seed: int = 0

    def rate(self, path: str) -> float:
        """Factor on the learning rate of a leaf."""
        return self.method.rate(path, self.settings) if self.method.rate else 1.0
