"""Partition rules, placing batches, and dividing the tree."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxtune.errors import UserError
from jaxtune.parallel import make_mesh, match_rules, place, shardings, state_specs
from jaxtune.parallel.mesh import mesh_shape
from jaxtune.weights import tree


def mesh_of(data=1, fsdp=1, tensor=1, sequence=1):
    return make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor, 'sequence': sequence})


def shapes(**leaves):
    return {name: {'kernel': jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in leaves.items()}


def test_kernels_are_divided_by_rule_and_axes_that_do_not_divide_are_left_out():
    specs = match_rules(shapes(q_proj=(2, 64, 32), o_proj=(2, 64, 32), k_proj=(2, 64, 3)), mesh_of(fsdp=4, tensor=2))
    assert specs['q_proj']['kernel'] == P(None, 'fsdp', 'tensor')
    assert specs['o_proj']['kernel'] == P(None, 'tensor', 'fsdp')
    assert specs['k_proj']['kernel'] == P(None, 'fsdp', None)


def test_unmatched_and_large_replicated_leaves_are_errors():
    mesh = mesh_of(fsdp=8)
    with pytest.raises(UserError, match=r'strange/thing.*no partition rule'):
        match_rules({'strange': {'thing': jax.ShapeDtypeStruct((8,), np.float32)}}, mesh)
    with pytest.raises(UserError, match=r'q_proj/kernel.*every device'):
        match_rules(shapes(q_proj=(1029, 1031)), mesh)
    match_rules(shapes(q_proj=(1029, 1031)), mesh_of(data=8))  # copies are what mesh.data asks for


@pytest.mark.parametrize(
    'make', [lambda: optax.adam(1e-3), lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=8)]
)
def test_optimizer_state_lies_as_its_parameters(make):
    mesh = mesh_of(fsdp=4, tensor=2)
    params = shapes(q_proj=(2, 64, 32))
    specs = match_rules(params, mesh)
    state = jax.eval_shape(make().init, params)
    found = state_specs(state, params, specs)
    for leaf, spec in zip(
        jax.tree.leaves(state), jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P)), strict=True
    ):
        expected = {(2, 64, 32): P(None, 'fsdp', 'tensor'), (2, 64): P(None, 'fsdp'), (2, 32): P(None, 'tensor')}
        assert spec == expected.get(leaf.shape, P())


@given(st.lists(st.sampled_from([1, 2, 4, 8, -1, 3]), min_size=4, max_size=4))
@settings(max_examples=80)
def test_mesh_shape_fills_or_refuses(sizes):
    named = dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=True))
    known = np.prod([size for size in sizes if size != -1])
    if sizes.count(-1) > 1 or 8 % known or (-1 not in sizes and known != 8):
        with pytest.raises(UserError, match=r'mesh\.data'):
            mesh_shape(named, 8)
        return
    shape = mesh_shape(named, 8)
    assert np.prod(shape) == 8
    assert all(given in (size, -1) for size, given in zip(shape, sizes, strict=True))


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (2, 2, 1, 2), (1, 1, 4, 2), (1, 1, 1, 8)])
def test_place_gives_every_device_its_rows_and_columns(sizes):
    mesh = mesh_of(*sizes)
    rows = np.arange(16 * 24).reshape(16, 24)
    asked = []

    def read(low, high):
        asked.append((low, high))
        return {'tokens': rows[low:high], 'lengths': rows[low:high, 0]}

    batch = place(read, 16, mesh)
    np.testing.assert_array_equal(batch['tokens'], rows)
    np.testing.assert_array_equal(batch['lengths'], rows[:, 0])
    assert asked == [(0, 16)]
    for shard in batch['tokens'].addressable_shards:
        assert shard.data.shape == (16 // (sizes[0] * sizes[1]), 24 // sizes[3])


@given(st.sets(st.sampled_from(['a/x', 'a/y', 'b/c/z', 'd'])))
def test_partition_and_combine_are_inverse(chosen):
    params = {'a': {'x': np.ones(1), 'y': np.ones(2)}, 'b': {'c': {'z': np.ones(3)}}, 'd': np.ones(4)}
    trainable, frozen = tree.partition(params, lambda path: path in chosen)
    assert set(tree.paths(trainable)) == chosen
    assert tree.count(trainable) + tree.count(frozen) == 10
    jax.tree.map(np.testing.assert_array_equal, tree.combine(trainable, frozen), params)


def test_shardings_are_on_the_mesh():
    mesh = mesh_of(fsdp=8)
    placed = shardings({'a': P('fsdp'), 'b': P()}, mesh)
    assert placed['a'].mesh == mesh
    assert placed['b'].is_fully_replicated
