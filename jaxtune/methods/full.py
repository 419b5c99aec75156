"""Full tuning: every weight trains."""

from typing import Any

import jax

from jaxtune.common.settings import Settings
from jaxtune.methods import Method
from jaxtune.models.model import Model


def init(params: Any, model: Model, settings: Settings, rng: jax.Array, tokenizer: Any) -> Any:
    """The tree as it is."""
    return params


METHOD = Method(
    name='full',
    init=init,
    trains=lambda path: True,
    merge=lambda params: params,
    flops_share=1.0,
    new_rows=True,
)
