"""What the backward pass computes again instead of keeping it (Chen et al. 2016, arXiv:1604.06174)."""

import flax.linen as nn
import jax

# Nothing is kept, or products and what attention's own backward pass reads.
_POLICIES = {
    'full': None,
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names('attention_out', 'attention_lse', 'product'),
    ),
}


def rematerialised(block: type[nn.Module], remat: str, scanned: bool = True) -> type[nn.Module]:
    """A block whose backward pass computes part of its forward pass again.

    Args:
      block: a module's class.
      remat: `none`, `full` (everything) or `dots` (all but products).
      scanned: the block is the body of a scan.
    """
    if remat == 'none':
        return block
    # In a scan the loop itself keeps XLA from merging the second computation with the first.
    return nn.remat(block, policy=_POLICIES[remat], prevent_cse=not scanned)
