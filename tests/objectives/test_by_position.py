"""Sums of losses by position: those of a plain loop, on any mesh, whatever shares a row."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.objectives import by_position
from jaxtune.parallel import make_mesh


def batch(seed=0, rows=8, length=32):
    """Rows of segments of random lengths, with padding at the end and weights between 0 and 1."""
    rng = np.random.default_rng(seed)
    positions, weights = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    for row in range(rows):
        at = 0
        while (size := int(rng.integers(2, length + 1))) <= length - at:
            positions[row, at : at + size] = np.arange(size)
            weights[row, at : at + size - 1] = rng.choice([0.0, 0.5, 1.0], size - 1)
            at += size
    logprobs = -rng.exponential(3.0, (rows, length)).astype(np.float32)
    return {'positions': positions, 'loss_mask': weights}, logprobs


def by_loop(edges, batch, logprobs):
    totals, counts = np.zeros(len(edges)), np.zeros(len(edges))
    for position, weight, logprob in zip(
        batch['positions'].ravel(), batch['loss_mask'].ravel(), logprobs.ravel(), strict=True
    ):
        bucket = max(i for i, edge in enumerate(edges) if edge <= position + 1)
        totals[bucket] -= weight * logprob
        counts[bucket] += weight
    return totals, counts


@pytest.mark.parametrize('buckets', [1, 3, 8, 32])
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 2, 1, 2), (1, 8, 1, 1)])
def test_sums_are_those_of_a_loop_on_any_mesh(buckets, sizes):
    rows, logprobs = batch()
    edges = by_position.bounds(buckets, 32)[:-1].astype(np.int32)
    count = int(np.prod(sizes))
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=True)), jax.devices()[:count])
    placed = NamedSharding(mesh, P(('data', 'fsdp'), 'sequence'))
    with jax.set_mesh(mesh):
        moved = {name: jax.device_put(value, placed) for name, value in rows.items()}
        found = jax.jit(by_position.sums)({**moved, by_position.EDGES: edges}, jax.device_put(logprobs, placed))
    for ours, expected in zip(found[by_position.SUMS], by_loop(edges, rows, logprobs), strict=True):
        assert ours.is_fully_replicated
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_a_batch_that_does_not_ask_gets_nothing():
    rows, logprobs = batch()
    assert by_position.sums(rows, logprobs) == {}
    assert by_position.bounds(0, 32) is None


def test_buckets_cover_a_row_and_one_without_tokens_has_no_loss():
    bounds = by_position.bounds(3, 32)
    assert bounds.tolist() == [0, 10, 21, 32]
    totals = np.array([6.0, 0.0, 2.0]), np.array([4.0, 0.0, 1.0])
    assert by_position.metrics(bounds, totals) == {
        'loss_by_position/0-9': 1.5,
        'tokens_by_position/0-9': 4,
        'tokens_by_position/10-20': 0,
        'loss_by_position/21-31': 2.0,
        'tokens_by_position/21-31': 1,
    }
