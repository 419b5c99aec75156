"""What a reference model says of all rows, asked once before training and kept in the workdir's cache."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common import console, io
from jaxtune.data.loader import Loader
from jaxtune.data.mixture import Mixture
from jaxtune.models import Model
from jaxtune.objectives import BoundObjective
from jaxtune.parallel import hosts, place
from jaxtune.parallel.batches import check_rows
from jaxtune.weights import eval_mode

# Loads the reference where it is a model of its own: its model and its parameters.
LoadReference = Callable[[str], tuple[Model, Any]]


class ReferenceLogps:
    """Gives rows the fields `reference_SIDE` that an objective's loss reads.

    Args:
      objective: what is learnt; without a reference, rows stay as they are.
      model: as training begins.
      params: its parameters.
      mesh: where they are.
      batch_size: sequences asked together.
      cache: folder in the workdir.
      identity: what else the values depend on: where the model came from, and how it computes.
      load: loads another model as the reference.
    """

    def __init__(
        self,
        objective: BoundObjective,
        model: Model,
        params: Any,
        mesh: Mesh,
        batch_size: int,
        cache: pathlib.Path,
        identity: tuple[str, ...],
        load: LoadReference,
    ) -> None:
        self.objective, self.model, self.params, self.mesh = objective, model, params, mesh
        self.batch_size, self.cache, self.identity, self.load = batch_size, cache, identity, load

    def complete(self, rows: Any, split: str) -> Any:
        """The rows with the reference's values, asked now or found in the cache."""
        reference = self.objective.objective.reference
        path = reference.path(self.objective.settings) if reference else None
        if reference is None or path is None:
            return rows
        if isinstance(rows, Mixture):
            for part in rows.parts.values():
                self.complete(part, split)
            return rows
        sides = reference.sides(self.objective.settings)
        file = self.cache / f'reference-{self._digest(rows, path, sides)}.npy'
        if not hosts.from_primary(file.is_file):
            model, params = self.load(path) if path else (self.model, self.params)
            values = self._ask(rows, model, eval_mode(params), sides, f'reference of data.{split}')
            hosts.from_primary(lambda: _save(file, values))
        else:
            values = np.asarray(hosts.from_primary(lambda: np.load(file, allow_pickle=False).tolist()), np.float32)
        rows.more = {f'reference_{side}': values[:, number] for number, side in enumerate(sides)}
        return rows

    def _digest(self, rows: Any, path: str, sides: tuple[str, ...]) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(rows.examples.ids).tobytes())
        digest.update(np.ascontiguousarray(rows.examples.offsets).tobytes())
        digest.update(json.dumps([path, *self.identity, rows.seq_len, *sides]).encode())
        return digest.hexdigest()[:16]

    def _ask(self, rows: Any, model: Model, params: Any, sides: tuple[str, ...], title: str) -> np.ndarray:
        """Values `[rows, sides]` under a model."""
        reference = self.objective.objective.reference
        assert reference is not None
        check_rows(self.mesh, 'eval.batch_size', self.batch_size)
        loader = Loader(rows, self.batch_size, shuffle=False)
        ask = jax.jit(
            lambda params, batch: reference.logps(model, params, batch, sides),
            out_shardings=NamedSharding(self.mesh, P()),
        )
        parts = []
        with console.progress(len(loader), title, 'batch') as bar:
            for t in range(len(loader)):
                batch = place(lambda low, high, t=t: loader.rows(t, low, high), self.batch_size, self.mesh)
                parts.append(np.asarray(ask(params, batch)))
                bar.advance(1)
        return np.concatenate(parts)[: len(rows)]


def _save(path: pathlib.Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_file(path, sync=False) as file:
        np.save(file, values, allow_pickle=False)
