"""Full tuning: every weight trains."""

from typing import Any

import jax

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.methods import Method
from jaxtune.models.model import Model


def init(params: Any, model: Model, settings: Settings, rng: jax.Array, tokenizer: Any) -> Any:
    """The tree as it is."""
    return params


def check(settings: Settings) -> None:
    """Refuses what has no meaning where all trains.

    Raises:
      UserError: names the key.
    """
    if settings.name == 'full' and settings.also_train:  # else it is the method of another model of the recipe
        raise UserError(f'method.also_train={settings.also_train}: expected none with method.name=full: all trains')


METHOD = Method(
    name='full',
    init=init,
    check=check,
    trains=lambda path: True,
    merge=lambda params: params,
    flops_share=1.0,
    new_rows=True,
)
