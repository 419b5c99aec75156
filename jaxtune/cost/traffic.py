"""Bytes that a mesh makes a device send in an update: a rough count, which needs no compiler, to rank meshes by."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Work:
    """What an update moves.

    Attributes:
      weights: bytes of all parameters.
      gradients: bytes of those that train.
      layers: how many.
      activations: bytes of the inputs of a layer, the whole batch.
      keys_values: bytes of keys and values of a layer, the whole batch.
    """

    weights: float
    gradients: float
    layers: int
    activations: float
    keys_values: float


def sent_bytes(work: Work, sizes: Mapping[str, int]) -> float:
    """Bytes a device sends, for sizes of the axes of a mesh, 1 where not named.

    Parameters are gathered for both passes and gradients scattered over `fsdp` and `sequence`, what is left of them is
    summed over `data`; a block's outputs are summed over `tensor` in both passes (Megatron-LM, arXiv:1909.08053), keys
    and values are gathered over `sequence`, tokens over `expert`.
    """
    data, fsdp, tensor, sequence, expert = (
        sizes.get(axis, 1) for axis in ('data', 'fsdp', 'tensor', 'sequence', 'expert')
    )
    shards = fsdp * sequence
    rows = data * fsdp * expert
    gathered = (2 * work.weights + work.gradients) / (tensor * expert) * (1 - 1 / shards)
    summed = 2 * work.gradients / (tensor * expert * shards) * (1 - 1 / data)
    own = work.activations / (rows * sequence)
    blocks = work.layers * 6 * 2 * own * (1 - 1 / tensor)
    attended = work.layers * 4 * work.keys_values / rows * (1 - 1 / sequence)
    routed = work.layers * 4 * own * (expert - 1)
    return gathered + summed + blocks + attended + routed
