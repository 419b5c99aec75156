"""What a loss that is no longer finite comes from."""

import pathlib

from jaxtune.common.settings import Settings
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.logger import Values


def last_good(checkpoints: Checkpoints, workdir: pathlib.Path) -> str:
    """Which checkpoint there is from before."""
    checkpoints.wait()
    newest = checkpoints.newest()
    good = f'the last good checkpoint is {newest}' if newest is not None else 'no checkpoint was saved yet'
    return f'{good} (in {workdir}/checkpoints)'


def cause(step: int, before: list[Values], optimizer: Settings, model_path: str) -> str:
    """Cause and remedy, by the gradient norms of the updates before.

    Args:
      step: the update.
      before: metrics of the updates before it.
      optimizer: the recipe's `optimizer` subtree.
      model_path: where the weights came from.
    """
    norms = [metrics['grad_norm'] for metrics in before]
    if not before and step == 1:
        return (
            'the very first batch gives it, so the weights handed in or the precision are at fault: expected '
            f'finite tensors in model.path={model_path!r}, or model.compute_dtype=float32'
        )
    if norms and max(norms) > 10 * norms[0]:
        return (
            f'the gradient norm rose from {norms[0]:.3g} to {max(norms):.3g} before it: expected a smaller '
            f'optimizer.lr than {optimizer.lr:g}, or more warm-up than {optimizer.warmup_steps} updates'
        )
    return (
        f'it came at once: expected a smaller optimizer.lr than {optimizer.lr:g}, optimizer.clip_norm > 0, or '
        'model.compute_dtype=float32'
    )
