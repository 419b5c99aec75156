"""Entropies over the vocabulary, their gradients, and both on a mesh, beside the whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.model import Head
from jaxtune.objectives.entropy import token_entropies
from jaxtune.parallel import AXES, make_mesh

BATCH, LENGTH, WIDTH = 4, 6, 16


def plain(hidden, kernel, bias, head):
    logits = jnp.einsum('btd,vd->btv' if head.vocab_major else 'btd,dv->btv', hidden, kernel) * (head.scale or 1.0)
    logits = logits if bias is None else logits + bias
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    logs = jax.nn.log_softmax(logits)
    return -(jnp.exp(logs) * logs).sum(-1)


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize('vocab', [48, 1024])  # of the latter, a CPU's copy of the kernel is filled up
@pytest.mark.parametrize(
    ('vocab_major', 'softcap', 'scale', 'biased'), [(True, None, None, False), (False, 2.0, 0.5, True)]
)
def test_entropies_and_gradients_are_those_of_the_whole_logits(sizes, vocab, vocab_major, softcap, scale, biased):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(vocab, WIDTH) if vocab_major else (WIDTH, vocab)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=vocab), jnp.float32) if biased else None
    weights = jnp.asarray(rng.normal(size=(BATCH, LENGTH)), jnp.float32)

    def head(kernel, bias):
        return Head(kernel, bias, vocab_major=vocab_major, softcap=softcap, scale=scale)

    def ours(hidden, kernel, bias):
        return (token_entropies(hidden, head(kernel, bias), chunk=5) * weights).sum()

    def wanted(hidden, kernel, bias):
        return (plain(hidden, kernel, bias, head(kernel, bias)) * weights).sum()

    mesh = make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[: int(np.prod(sizes))])
    which = (0, 1, 2) if biased else (0, 1)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(ours, which))(hidden, kernel, bias)
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.value_and_grad(wanted, which)(hidden, kernel, bias)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
