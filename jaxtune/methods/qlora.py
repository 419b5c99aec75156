"""QLoRA: LoRA over a base of four bits a weight (Dettmers et al. 2023, arXiv:2305.14314).

All linear kernels become `NF4` while they are read; the wide model is never in memory. Paged optimizer state has two
answers here: `optimizer.name=adamw8bit` and `optimizer.offload`.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from jaxtune.methods import lora
from jaxtune.methods.lora import check, merge, rate, trains
from jaxtune.methods.targets import linear
from jaxtune.models.model import Model
from jaxtune.weights import Codec

__all__ = ['check', 'codecs', 'init', 'merge', 'rate', 'trains']


def codecs(model: Model, config: ConfigDict) -> dict[str, Codec]:
    """Every linear kernel but the output's is stored as NF4."""
    codec = Codec(config.block_size, config.double_quant, str(model.param_dtype))
    return dict.fromkeys(linear(model), codec)


def init(params: Any, model: Model, config: ConfigDict, rng: jax.Array) -> Any:
    """The tree with a `LoRA` leaf around every targeted NF4 weight."""
    return lora.init(params, model, config, rng)
