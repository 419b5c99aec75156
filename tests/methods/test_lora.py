"""Adding the update to the weight first, where there are many tokens, is the same function with the same gradients."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.weights import nf4
from jaxtune.weights.leaf import dot
from jaxtune.weights.lora import LoRA


def make_leaf(rng, inputs, outputs, rank, kind):
    normal = lambda *shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)  # noqa: E731
    base = normal(inputs, outputs)
    leaf = LoRA(base, normal(inputs, rank), normal(rank, outputs), jnp.float32(rng.uniform(0.5, 2)))
    if kind == 'nf4':
        leaf = dataclasses.replace(leaf, base=nf4.Codec().encode_kernel(base))
    if kind == 'dora':
        leaf = dataclasses.replace(leaf, magnitude=1 + jnp.abs(normal(outputs)))
    if kind == 'pissa':
        leaf = dataclasses.replace(leaf, a_start=normal(inputs, rank), b_start=normal(rank, outputs))
    return leaf


def value_and_gradients(leaf, x, weight):
    def loss(x, a, b, magnitude):
        y = dot(x, dataclasses.replace(leaf, a=a, b=b, magnitude=magnitude))
        return (y * weight).sum(), y

    trained = (x, leaf.a, leaf.b, leaf.magnitude)
    wanted = tuple(n for n, value in enumerate(trained) if value is not None)
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=wanted, has_aux=True))(*trained)
    return y, gradients


@pytest.mark.parametrize('kind', ['plain', 'nf4', 'dora', 'pissa'])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 5), st.integers(2, 70), st.integers(2, 70), st.integers(1, 8), st.integers(0, 2**31))
def test_sum_first_is_the_same(kind, rows, inputs, outputs, rank, seed):
    rng = np.random.default_rng(seed)
    leaf = make_leaf(rng, inputs, outputs, rank, kind)
    x = jnp.asarray(rng.normal(0, 1, (rows, 80, inputs)), jnp.float32)
    weight = jnp.asarray(rng.normal(0, 1, (rows, 80, outputs)), jnp.float32)
    assert leaf._summed_first(x)
    ours = value_and_gradients(leaf, x, weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRA, '_summed_first', lambda self, x: False)
        theirs = value_and_gradients(leaf, x, weight)
    scale = max(float(jnp.abs(value).max()) for value in jax.tree.leaves(theirs))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=2e-6 * scale)


def test_few_tokens_or_bfloat16_keep_the_update_apart():
    leaf = make_leaf(np.random.default_rng(0), 32, 48, 4, 'plain')
    assert leaf._summed_first(jnp.zeros((1, 48, 32)))
    assert not leaf._summed_first(jnp.zeros((1, 47, 32)))
    assert not leaf._summed_first(jnp.zeros((1, 64, 32), jnp.bfloat16))
