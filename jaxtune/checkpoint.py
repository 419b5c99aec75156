"""Saving and restoring a run with Orbax: asynchronous, atomic, the newest and the best kept."""

import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxtune.errors import UserError


class Checkpoints:
    """The folder `checkpoints/` of a workdir.

    Args:
      folder: made if it is not there.
      keep: how many of the newest stay.
      metric: the best by this metric stays beside them.
      rises: whether a larger value of it is better.
    """

    def __init__(self, folder: pathlib.Path, keep: int, metric: str, rises: bool):
        self._metric = metric
        sign = 1.0 if rises else -1.0

        def score(metrics: dict[str, float] | None) -> float:
            return sign * metrics[metric] if metrics and metric in metrics else -float('inf')

        self._score = score
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.BestN(get_metric_fn=score, n=1)]
            ),
            best_fn=score,  # without it no metrics are written, and a resumed run would forget which was the best
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            step_prefix=None,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, loop: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts saving; the state may be donated as soon as this returns."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop))
        kept = {self._metric: metrics[self._metric]} if self._metric in metrics else None
        self._manager.save(step, args=args, metrics=kept, force=True)

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the loop's own notes at a step, straight onto the mesh.

        Args:
          step: one that `newest` or `best` returned.
          shapes: tree of `jax.ShapeDtypeStruct`.
          shardings: tree of shardings of the same structure.

        Raises:
          UserError: the checkpoint is of another model.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), loop=ocp.args.JsonRestore())
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f'{self._manager.directory}/{step}: expected the state of this very model and optimizer: {error}'
            ) from None
        return restored.state, restored.loop

    def best(self) -> int | None:
        """The step of the best checkpoint, None where none was evaluated."""
        scored = [
            (self._score(dict(info)), step)
            for step in self._manager.all_steps()
            if (info := self._manager.metrics(step)) is not None and self._metric in info
        ]
        return max(scored)[1] if scored else None

    def wait(self) -> None:
        """Returns when everything begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the manager's threads."""
        self._manager.close()


def clear(folder: pathlib.Path) -> None:
    """Removes all checkpoints of a workdir."""
    shutil.rmtree(folder, ignore_errors=True)
