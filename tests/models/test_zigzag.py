"""Zigzag order: what each device has to do, when it pays, and that chunks go where they should and come back."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtune import models
from jaxtune.models import zigzag
from jaxtune.parallel import make_mesh


@pytest.mark.parametrize('shards', [2, 4, 8])
@pytest.mark.parametrize('window', [None, 5, 40])
def test_pairs_of_the_busiest_device(shards, window):
    length = 16 * shards
    rows, columns = np.arange(length)[:, None], np.arange(length)
    seen = (columns <= rows) & (rows - columns < (window or length))
    for order, zigzags in ((np.arange(length), False), (zigzag.positions(length, shards), True)):
        assert sorted(order) == list(range(length))
        most = seen[order].reshape(shards, -1).sum(1).max()
        assert zigzag.busiest(length, shards, window, zigzags) == most
    if window is None:
        assert most * shards == seen.sum()  # all have as much to do


def test_it_pays_where_rows_are_long():
    assert zigzag.pays(131072, 8)
    assert zigzag.pays(8192, 2)
    assert not zigzag.pays(2048, 8)
    assert not zigzag.pays(131072, 8, causal=False)
    assert not zigzag.pays(131072, 1)
    assert not zigzag.pays(131072, 8, window=4096)  # balanced as it is
    assert not zigzag.pays(8 * (8192 + 128), 8)  # chunks would end within a kernel's block
    whole = 131072 * 131073 / 2 / 131072**2
    assert zigzag.attended(131072, 1) == zigzag.attended(131072, 8) == whole
    last = zigzag.attended(8 * (8192 + 128), 8)
    assert last == pytest.approx((2 - 1 / 8) / 2, rel=1e-3)


@pytest.mark.parametrize('shards', [2, 4, 8])
def test_chunks_go_and_come_back(shards):
    length = 4 * shards
    x = np.arange(2 * length * 3, dtype=np.float32).reshape(2, length, 3)
    mesh = make_mesh({'sequence': shards}, jax.devices()[:shards])
    spec = P(None, 'sequence')

    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(lambda x: zigzag.spread(x, shards), in_specs=spec, out_specs=spec))
        back = jax.jit(jax.shard_map(lambda x: zigzag.restore(x, shards), in_specs=spec, out_specs=spec))
        moved = run(x)
        np.testing.assert_array_equal(moved, x[:, zigzag.positions(length, shards)])
        np.testing.assert_array_equal(back(moved), x)
        # The way back is the transpose too.
        (pulled,) = jax.vjp(run, x)[1](moved)
        np.testing.assert_array_equal(pulled, x)


def test_a_models_kernels_count_as_on_the_busiest_device():
    fields = {
        'model_type': 'gemma2', 'vocab_size': 96, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
        'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 16, 'sliding_window': 1024,
    }  # fmt: skip
    model = models.build(models.read_config(fields))
    assert sorted(model.config.windows, key=str) == [1024, None]
    whole, narrow = zigzag.attended(16384, 4), zigzag.busiest(16384, 4, 1024, True) * 4 / 16384**2
    assert model.pairs_seen(16384, 4) == pytest.approx((whole + narrow) / 2)
    assert narrow == pytest.approx(1024 / 16384, rel=0.02)
    assert model.pairs_seen(16384) == pytest.approx((0.5 + narrow) / 2, rel=0.02)
