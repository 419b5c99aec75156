"""Partition rules, placing batches, and dividing the tree."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxtune.errors import UserError
from jaxtune.optim.optimizers import make_optimizer
from jaxtune.parallel import make_mesh, match_rules, place, shardings, state_specs
from jaxtune.parallel.mesh import mesh_shape
from jaxtune.parallel.rules import path_name
from jaxtune.recipe import recipes
from jaxtune.weights import Codec, LoRA, tree


def mesh_of(data=1, fsdp=1, tensor=1, sequence=1):
    return make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor, 'sequence': sequence})


def shapes(**leaves):
    return {name: {'kernel': jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in leaves.items()}


def test_kernels_are_divided_by_rule_and_axes_that_do_not_divide_are_left_out():
    kernels = shapes(q_proj=(2, 64, 32), o_proj=(2, 64, 32), k_proj=(2, 64, 3), down_proj=(2, 6, 32))
    specs = match_rules(kernels, mesh_of(fsdp=4, tensor=2))
    assert specs['q_proj']['kernel'] == P(None, 'fsdp', 'tensor')
    assert specs['o_proj']['kernel'] == P(None, ('tensor', 'fsdp'), None)
    assert specs['down_proj']['kernel'] == P(None, 'tensor', None)
    assert specs['k_proj']['kernel'] == P(None, 'fsdp', None)


def test_unmatched_and_large_replicated_leaves_are_errors():
    mesh = mesh_of(fsdp=8)
    with pytest.raises(UserError, match=r'strange/thing.*no partition rule'):
        match_rules({'strange': {'thing': jax.ShapeDtypeStruct((8,), np.float32)}}, mesh)
    with pytest.raises(UserError, match=r'q_proj/kernel.*every device.*mesh\.fsdp=8'):
        match_rules(shapes(q_proj=(1029, 1031)), mesh)
    match_rules(shapes(q_proj=(1029, 1031)), mesh_of(data=8))  # copies are what mesh.data asks for


def test_a_large_leaf_that_its_rule_leaves_whole_is_divided_where_an_axis_can():
    fsdp, tensor = mesh_of(data=2, fsdp=4), mesh_of(data=2, tensor=4)
    wide = (2, 6, 8192)
    assert match_rules(shapes(q_proj=wide), fsdp, large=2**10)['q_proj']['kernel'] == P(None, None, 'fsdp')
    assert match_rules(shapes(o_proj=wide), tensor, large=2**10)['o_proj']['kernel'] == P(None, None, 'tensor')
    assert match_rules(shapes(q_proj=wide), fsdp)['q_proj']['kernel'] == P(None, None, None)  # too small to matter


def adapted(outputs, base=None):
    """LoRA of rank 8 with DoRA's magnitudes beside a kernel `[2, 64, outputs]`."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    leaf = LoRA(base or array(2, 64, outputs), array(2, 64, 8), array(2, 8, outputs), array(2), array(2, outputs))
    return {'down_proj': {'kernel': leaf}}


def test_factors_are_divided_by_any_axis_or_copied_and_never_refused():
    for axis in ('fsdp', 'tensor'):
        leaf = match_rules(adapted(512), mesh_of(data=2, **{axis: 4}), large=2**9)['down_proj']['kernel']
        assert leaf.a == P(None, axis, None)
        assert leaf.b == P(None, None, axis)
        assert leaf.magnitude == P(None, axis)
    # Nothing divides 515 outputs, and `a` is divided as the kernel's inputs are.
    leaf = match_rules(adapted(515), mesh_of(fsdp=4, data=2), large=2**9)['down_proj']['kernel']
    assert (leaf.base, leaf.a, leaf.magnitude) == (P(None, 'fsdp', None), P(None, 'fsdp', None), P())
    with pytest.raises(UserError, match='down_proj/kernel'):
        match_rules(adapted(515, jax.ShapeDtypeStruct((2, 63, 515), np.float32)), mesh_of(fsdp=8), large=2**9)


def test_scales_of_scales_are_copied():
    base = jax.eval_shape(Codec().encode_kernel, jax.ShapeDtypeStruct((2, 256, 512), np.float32))
    found = match_rules(adapted(512, base), mesh_of(fsdp=4, data=2), large=2)['down_proj']['kernel'].base
    assert found.codes == found.scales == P(None, None, 'fsdp')
    assert found.outer == found.offset == P()


@pytest.mark.parametrize('name', ['adamw', 'adamw8bit', 'adafactor', 'muon'])
def test_optimizer_state_lies_as_its_parameters(name):
    config = recipes.defaults().optimizer
    config.name = name
    mesh = mesh_of(fsdp=4, tensor=2)
    params = shapes(q_proj=(2, 64, 512), k_proj=(2, 64, 64))
    specs = match_rules(params, mesh)
    state = jax.eval_shape(make_optimizer(config, 10).init, params)
    found = state_specs(state, params, specs)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P)),
        strict=True,
    ):
        expected = {(2, 64, 512): P(None, 'fsdp', 'tensor'), (2, 64, 64): P(None, 'fsdp', 'tensor')}
        expected |= {(2, 64): P(None, 'fsdp'), (2, 512): P(None, 'tensor')}
        expected |= {(2, 64, 2): P(None, 'fsdp', None), (2, 16): P(None, None)}  # scales of blocks
        col = 'k_proj' in path_name(path) and path_name(path).endswith('col')
        assert spec == (P(None, 'tensor') if col else expected.get(leaf.shape, P()))


@given(st.lists(st.sampled_from([1, 2, 4, 8, -1, 3]), min_size=4, max_size=4))
@settings(max_examples=80)
def test_mesh_shape_fills_or_refuses(sizes):
    named = dict(zip(('data', 'fsdp', 'tensor', 'sequence', 'expert'), (*sizes, 1), strict=True))
    known = np.prod([size for size in sizes if size != -1])
    if sizes.count(-1) > 1 or 8 % known or (-1 not in sizes and known != 8):
        with pytest.raises(UserError, match=r'mesh\.data'):
            mesh_shape(named, 8)
        return
    shape = mesh_shape(named, 8)
    assert np.prod(shape) == 8
    assert all(given in (size, -1) for size, given in zip(shape, (*sizes, 1), strict=True))


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
