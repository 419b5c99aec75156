"""QLoRA: LoRA over a base of four bits a weight (Dettmers et al. 2023, arXiv:2305.14314).

All linear kernels become `NF4` while they are read; the wide model is never in memory. Paged optimizer state has two
answers here: `optimizer.name=adamw8bit` and `optimizer.offload`.
"""

import dataclasses

from jaxtune.common.settings import Settings
from jaxtune.methods import lora
from jaxtune.methods.targets import linear
from jaxtune.models.model import Model
from jaxtune.weights import Codec


def codecs(model: Model, settings: Settings) -> dict[str, Codec]:
    """Every linear kernel but the output's is stored as NF4."""
    codec = Codec(settings.block_size, settings.double_quant, str(model.param_dtype))
    return dict.fromkeys(linear(model), codec)


METHOD = dataclasses.replace(lora.METHOD, name='qlora', codecs=codecs, read_adapter={})
