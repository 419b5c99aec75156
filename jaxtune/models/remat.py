"""Activation checkpointing: what the forward pass keeps for the backward pass (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

# What `model.remat` may list, and the names that the layers give those arrays. `LAYER_INPUT` is what every layer keeps.
_LAYER_INPUT = 'layer_input'
NAMES: Mapping[str, tuple[str, ...]] = {
    'qkv': ('attention_q', 'attention_k', 'attention_v'),
    'attn_out': ('attention_out', 'attention_lse'),
    'attn_proj': ('attention_projection',),
    'mlp_in': ('mlp_in',),
    'mlp_out': ('mlp_out',),
}

_policies = jax.checkpoint_policies
_KEPT: Mapping[str, Any] = {
    # A fused kernel's own backward pass reads its output: without it the kernel would run twice.
    'full': _policies.save_only_these_names(*NAMES['attn_out']),
    'dots': _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(*NAMES['attn_out'], 'product'),
    ),
    'offload': _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=['attention_lse'],
        names_which_can_be_offloaded=[_LAYER_INPUT, 'attention_out'],
        offload_src='device',
        offload_dst='pinned_host',
    ),
}


def named(name: str, x: jax.Array) -> jax.Array:
    """`x`, kept for the backward pass where `model.remat` lists `name` of `NAMES`, which has one array."""
    (own,) = NAMES[name]
    return checkpoint_name(x, own)


def layer_input(x: jax.Array) -> jax.Array:
    """`x`, which a layer begins with: what lies in the host's memory with `model.remat=offload`."""
    return checkpoint_name(x, _LAYER_INPUT)


def recomputed(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The body of a scan with activation checkpointing; `remat` as for `rematerialised`."""
    if remat == 'none':
        return function
    # The loop itself keeps XLA from merging the second computation with the first.
    return jax.checkpoint(function, policy=_policy(remat), prevent_cse=False)


def rematerialised(block: type[nn.Module], remat: str, scanned: bool = True) -> type[nn.Module]:
    """A block with activation checkpointing.

    Args:
      block: a module's class.
      remat: what the forward pass keeps beside what a layer begins with: `none` keeps all that the backward pass reads,
        `full` attention's output alone, `dots` that and outputs of matrix products, `offload` what `full` keeps, in the
        host's memory; or some of `NAMES` with commas between them.
      scanned: the block is the body of a scan.
    """
    if remat == 'none':
        return block
    # In a scan the loop itself keeps XLA from merging the second computation with the first.
    return nn.remat(block, policy=_policy(remat), prevent_cse=not scanned)


def _policy(remat: str) -> Any:
    if remat in _KEPT:
        return _KEPT[remat]
    return _policies.save_only_these_names(*(own for name in remat.split(',') for own in NAMES[name.strip()]))
