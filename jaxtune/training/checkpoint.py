"""Saving and restoring a run with Orbax: asynchronous, atomic, checked; the newest and the best kept."""

import concurrent.futures
import hashlib
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxtune.common import console
from jaxtune.common.io import read_json, write_json
from jaxtune.errors import UserError
from jaxtune.parallel import hosts
from jaxtune.recipe.workdir import SIGNATURE

_UNSIGNED = (SIGNATURE, '_CHECKPOINT_METADATA')  # the latter gets the time of the commit after it
_READERS = 8  # threads that compute checksums


class DamagedError(UserError):
    """A checkpoint does not hold what was saved."""


class Checkpoints:
    """The folder `checkpoints/` of a workdir.

    Args:
      folder: made if it is not there.
      keep: how many of the newest stay.
      metric: the best by this metric stays beside them.
      higher_is_better: whether a higher value of it is.
      signature: of the recipe, saved in each (`workdir.signature`).
      read_only: of a run that may be going on; nothing is saved, made or removed.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int,
        metric: str,
        higher_is_better: bool,
        signature: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ) -> None:
        self._folder, self._metric, self._signature = folder, metric, dict(signature or {})
        self._saving: int | None = None
        sign = 1.0 if higher_is_better else -1.0

        def score(metrics: dict[str, float] | None) -> float:
            return sign * metrics[metric] if metrics and metric in metrics else -float('inf')

        self._score = score
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.BestN(get_metric_fn=score, n=1)]
            ),
            best_fn=score,  # without it no metrics are written, and a resumed run would forget which was the best
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sign),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            step_prefix=None,
        )
        hosts.from_primary(lambda: _without_damaged_metrics(folder, read_only))
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, loop: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts saving; the state may be donated as soon as this returns."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop))
        tracked = {self._metric: metrics[self._metric]} if self._metric in metrics else None
        self.wait()
        self._saving = step
        self._manager.save(step, args=args, metrics=tracked, force=True)

    def _sign(self) -> None:
        """Writes the checksums into the checkpoint under way, which is about to get its name; in Orbax's thread."""
        partial = next(self._folder.glob(f'{self._saving}.orbax-checkpoint-tmp*'))
        write_json(partial / SIGNATURE, self._signature | {'files': checksums(partial)})

    def restore(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The state and the loop's own notes at a step, straight onto the mesh.

        Args:
          step: one that `newest` or `best` returned.
          shapes: tree of `jax.ShapeDtypeStruct`.
          shardings: tree of shardings of the same structure.

        Raises:
          DamagedError: its files are not what was saved.
          UserError: the checkpoint is of another model.
        """
        name = f'{self._folder}/{step}'
        signed, damage = hosts.from_primary(lambda: list(check(self._folder / str(step))))
        if damage:
            raise DamagedError(f'{name}: {damage}; expected the files as they were saved')
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), loop=ocp.args.JsonRestore())
            )
        except Exception as error:
            if signed and not isinstance(error, ValueError | KeyError):
                raise
            # Without checksums a damaged file shows here, in one of many ways.
            kind = UserError if signed else DamagedError
            raise kind(f'{name}: expected the state of this very model and optimizer: {error}') from None
        return restored['state'], restored['loop']

    def restore_newest(self, shapes: Any, shardings: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and notes of the newest whole checkpoint, None where there is none; damaged newer ones go.

        Raises:
          DamagedError: there are checkpoints, and all are damaged.
          UserError: the checkpoint is of another model.
        """
        damaged: dict[int, DamagedError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, loop = self.restore(step, shapes, shardings)
            except DamagedError as error:
                damaged[step] = error
                continue
            for newer, error in damaged.items():
                console.note(f'damaged, left out: {error}')
                self._manager.delete(newer)
            return step, state, loop
        for error in damaged.values():
            raise error
        return None

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


def _without_damaged_metrics(folder: pathlib.Path, read_only: bool) -> None:
    """Removes metrics that are no JSON, all of which Orbax reads at once; the checksums tell of their checkpoint.

    Raises:
      DamagedError: there are some, and nothing may be removed.
    """
    for metrics in folder.glob('[0-9]*/metrics/metrics'):
        try:
            whole = isinstance(read_json(metrics), dict | None)
        except UserError:
            whole = False
        if not whole and read_only:
            raise DamagedError(f'{metrics}: damaged; expected the files as they were saved')
        if not whole:
            shutil.rmtree(metrics.parent)


def checksums(folder: pathlib.Path) -> dict[str, list]:
    """Size in bytes and SHA-256 of every file in a checkpoint, by its path there, but for Orbax's note of when."""
    paths = sorted(path for path in folder.rglob('*') if path.is_file() and path.name not in _UNSIGNED)

    def read(path: pathlib.Path) -> list:
        with open(path, 'rb') as file:
            return [path.stat().st_size, hashlib.file_digest(file, 'sha256').hexdigest()]

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return {str(path.relative_to(folder)): entry for path, entry in zip(paths, pool.map(read, paths), strict=True)}


def check(folder: pathlib.Path) -> tuple[bool, str]:
    """Whether a checkpoint has checksums, which those of older versions lack, and what is wrong with it, or ''."""
    try:
        saved = read_json(folder / SIGNATURE)
        if saved is None:
            return False, ''
        expected, actual = saved['files'], checksums(folder)
    except (UserError, TypeError, KeyError):
        return True, f'{SIGNATURE} is damaged'
    except OSError as error:
        return True, f'cannot be read: {error.strerror}'
    for path, entry in expected.items():
        if path not in actual:
            return True, f'{path} is missing'
        if actual[path] != entry:
            return True, f'{path} is damaged'
    return True, ''
