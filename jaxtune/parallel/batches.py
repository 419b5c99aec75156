"""Placing a global batch on the mesh: every process reads only the rows that its own devices need."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common.checks import MOST
from jaxtune.errors import UserError
from jaxtune.parallel.mesh import BATCH_AXES, batch_shards


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows over `data` and `fsdp`, length over `sequence`."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return NamedSharding(mesh, P(axes, *(('sequence',) if ndim > 1 else ())))


def _shards(mesh: Mesh) -> str:
    """The keys that a number of rows is divided by."""
    return ' x '.join(f'mesh.{axis}' for axis in BATCH_AXES if axis != 'expert' or mesh.shape.get(axis, 1) > 1)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int, row: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Refuses sizes that the mesh cannot divide, naming the key.

    Args:
      mesh: what divides them.
      batch_size: rows of an update.
      accumulate: micro-batches that they are cut into.
      row: an objective's row; each field's first axis is its length.

    Raises:
      UserError: a micro-batch does not divide over `data` and `fsdp`, or the length over `sequence`; or an update has
        more tokens than XLA's sizes of 64 bits leave room for.
    """
    rows = batch_shards(mesh)
    if batch_size % accumulate:
        raise UserError(f'train.batch_size={batch_size}: expected a multiple of train.accumulate={accumulate}')
    if (batch_size // accumulate) % rows:
        raise UserError(
            f'train.batch_size={batch_size} in {accumulate} micro-batches of {batch_size // accumulate}: expected a '
            f'multiple of {_shards(mesh)} = {rows} in each'
        )
    for name, field in row.items():
        if field.shape and field.shape[0] % mesh.shape['sequence']:
            key, size = ('data.target_len' if name.startswith('target') else 'data.seq_len'), mesh.shape['sequence']
            raise UserError(f'{key}={field.shape[0]}: expected a multiple of mesh.sequence={size}')
        if field.shape and batch_size * field.shape[0] > MOST:
            raise UserError(
                f'train.batch_size={batch_size}: expected at most {MOST} tokens an update, in rows of {field.shape[0]}'
            )


def check_rows(mesh: Mesh, key: str, rows: int) -> None:
    """Refuses a number of rows, a recipe's key, that the mesh cannot divide.

    Raises:
      UserError: it does not divide over `data` and `fsdp`.
    """
    per = batch_shards(mesh)
    if rows % per:
        raise UserError(f'{key}={rows}: expected a multiple of {_shards(mesh)} = {per}')


def place_all(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch that every process holds whole, `{field: [batch, ...]}`, as global arrays."""
    batch_size = len(next(iter(arrays.values())))
    return place(lambda low, high: {name: array[low:high] for name, array in arrays.items()}, batch_size, mesh)


def place(rows: Callable[[int, int], dict[str, np.ndarray]], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Builds the global batch from the rows that this process holds.

    Args:
      rows: `(low, high) -> {field: [high - low, ...]}`, rows of the global batch.
      batch_size: rows of the global batch.
      mesh: where to put it.

    Returns:
      `{field: [batch, ...]}` as global arrays.
    """
    starts = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    bounds = [
        (index[0].start or 0, batch_size if index[0].stop is None else index[0].stop)
        for index in starts
        if index is not None
    ]
    low, high = min(bound[0] for bound in bounds), max(bound[1] for bound in bounds)
    local = rows(low, high)

    def global_array(value: np.ndarray) -> jax.Array:
        shape = (batch_size, *value.shape[1:])

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return value[(slice(start - low, stop - low), *index[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, value.ndim), read)

    return {name: global_array(value) for name, value in local.items()}
