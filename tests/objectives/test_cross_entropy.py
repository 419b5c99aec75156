"""The chunked loss against the plain formula: values, gradients, meshes and memory."""

import dataclasses
import re
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune import models
from jaxtune.objectives.cross_entropy import cross_entropy, token_logprobs, token_scores
from jaxtune.parallel import AXES, make_mesh
from jaxtune.weights import NewRows


@dataclasses.dataclass(frozen=True)
class Head:
    kernel: Any
    bias: Any = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_major: bool = True


def example(seed, batch, length, width, vocab, vocab_major=True, bias=False):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    kernel = rng.normal(size=(vocab, width) if vocab_major else (width, vocab)).astype(np.float32)
    bias = rng.normal(size=vocab).astype(np.float32) if bias else None
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    weights = (rng.random((batch, length)) < 0.7).astype(np.float32) * rng.random((batch, length)).astype(np.float32)
    return hidden, kernel, bias, targets, weights


def plain_logprobs(hidden, kernel, bias, targets, head):
    logits = jnp.einsum('bld,vd->blv' if head.vocab_major else 'bld,dv->blv', hidden, kernel) * head.scale
    if bias is not None:
        logits = logits + bias
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    logprobs = jax.nn.log_softmax(logits)
    right = logits.argmax(-1) == targets
    return jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], right


def plain(hidden, kernel, bias, targets, weights, head):
    logprobs, right = plain_logprobs(hidden, kernel, bias, targets, head)
    return -(weights * logprobs).sum(), (weights * right).sum()


def close(ours, theirs, tolerance=1e-5):
    """Equal within a tolerance relative to the largest entry."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

    jax.tree.map(check, ours, theirs)


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    vocab=st.integers(2, 40),
    vocab_major=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.25]),
    chunk=st.sampled_from([1, 4, 7, None]),
)
@hypothesis.example(0, 2, 5, 1024, True, False, None, 0.25, 4)  # what is padded
@hypothesis.example(1, 2, 5, 1024, False, True, None, 1.0, 4)
@hypothesis.example(2, 1, 5, 1024, True, True, 3.0, 1.0, None)
def test_equals_the_plain_formula(seed, batch, length, vocab, vocab_major, bias, softcap, scale, chunk):
    arrays = example(seed, batch, length, 8, vocab, vocab_major, bias)
    head = Head(None, None, softcap, scale, vocab_major)

    def ours(hidden, kernel, bias, targets, weights):
        full = dataclasses.replace(head, kernel=kernel, bias=bias)
        loss, correct = cross_entropy(hidden, full, targets, weights, chunk=chunk)
        return 1.7 * loss, correct

    def theirs(*arrays):
        loss, correct = plain(*arrays, head)
        return 1.7 * loss, correct

    where = (0, 1, 2, 4) if bias else (0, 1, 4)
    close(
        jax.value_and_grad(ours, where, has_aux=True)(*arrays), jax.value_and_grad(theirs, where, has_aux=True)(*arrays)
    )
    close(ours(*arrays), theirs(*arrays))

    rng = np.random.default_rng(seed + 1)
    cotangent = rng.normal(size=(batch, length)).astype(np.float32)

    def our_logprobs(hidden, kernel, bias):
        full = dataclasses.replace(head, kernel=kernel, bias=bias)
        return token_logprobs(hidden, full, arrays[3], chunk=chunk)

    def their_logprobs(hidden, kernel, bias):
        return plain_logprobs(hidden, kernel, bias, arrays[3], head)[0]

    value, pull = jax.vjp(our_logprobs, *arrays[:3])
    reference, reference_pull = jax.vjp(their_logprobs, *arrays[:3])
    close(value, reference)
    close(pull(cotangent), reference_pull(cotangent))
    full = dataclasses.replace(head, kernel=arrays[1], bias=arrays[2])
    scores, right = token_scores(arrays[0], full, arrays[3], chunk=chunk)
    close(scores, reference)
    np.testing.assert_array_equal(right, plain_logprobs(*arrays[:4], head)[1])


def test_only_wanted_gradients_are_made():
    hidden, kernel, _, targets, weights = example(0, 2, 8, 16, 32)

    def loss(hidden):
        return cross_entropy(hidden, Head(kernel), targets, weights)[0]

    def products(function):
        return str(jax.make_jaxpr(function)(hidden)).count('dot_general')

    assert products(loss) == 1
    assert products(jax.grad(loss)) == 2
    assert products(jax.grad(lambda hidden: loss(hidden) + 0 * hidden.sum())) == 2


def test_tokens_without_weight_do_not_count():
    hidden, kernel, _, targets, weights = example(1, 2, 6, 8, 16)
    weights[:, 3:] = 0
    wild = targets.copy()
    wild[:, 3:] = -100

    def loss(hidden, targets):
        return cross_entropy(hidden, Head(kernel), targets, weights)

    (value, _), grad = jax.value_and_grad(loss, has_aux=True)(hidden, wild)
    chex.assert_trees_all_close(value, loss(hidden, targets)[0])
    assert not np.asarray(grad[:, 3:]).any()


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 1, 4, 2), (1, 2, 1, 4)], ids=str)
@pytest.mark.parametrize('vocab_major', [True, False])
def test_any_mesh_gives_the_same(sizes, vocab_major):
    arrays = example(2, 8, 8, 16, 24, vocab_major, bias=True)
    head = Head(None, None, 5.0, 0.5, vocab_major)
    mesh = make_mesh(dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=True)), jax.devices()[:8])
    batch = P(('data', 'fsdp'), 'sequence')
    kernel_spec = P('tensor', 'fsdp') if vocab_major else P('fsdp', 'tensor')
    specs = (P(*batch, None), kernel_spec, P('tensor'), batch, batch)

    def ours(hidden, kernel, bias, targets, weights):
        full = dataclasses.replace(head, kernel=kernel, bias=bias)
        return cross_entropy(hidden, full, targets, weights, chunk=3)

    def ours_logprobs(hidden, kernel, bias, targets, weights):
        full = dataclasses.replace(head, kernel=kernel, bias=bias)
        return (token_logprobs(hidden, full, targets, chunk=3) * weights).sum()

    def theirs(*arrays):
        return plain(*arrays, head)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        got = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 4), has_aux=True))(*placed)
        got_logprobs = jax.jit(jax.value_and_grad(ours_logprobs, (0, 1, 2)))(*placed)
    (loss, correct), grads = jax.value_and_grad(theirs, (0, 1, 2, 4), has_aux=True)(*arrays)
    close(got, ((loss, correct), grads))
    close(got_logprobs, (-loss, jax.tree.map(jnp.negative, grads[:3])))


def test_kernel_gradient_is_summed_once_not_once_a_chunk():
    arrays = example(3, 8, 32, 16, 64)
    mesh = make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1, 'sequence': 1}, jax.devices()[:8])

    def loss(hidden, kernel):
        return cross_entropy(hidden, Head(kernel), arrays[3], arrays[4], chunk=4)[0]

    with jax.set_mesh(mesh):
        hidden = jax.device_put(arrays[0], NamedSharding(mesh, P('data')))
        text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, arrays[1]).compile().as_text()
    reduced = [line for line in text.splitlines() if re.search(r'all-reduce(-start)?\(', line)]
    assert any('64,16' in line for line in reduced)
    assert not any('while' in line for line in reduced)


def test_never_holds_all_logits():
    batch, length, width, vocab = 2, 2048, 8, 4096
    shapes = [
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    ]

    def loss(hidden, kernel, targets, weights):
        return cross_entropy(hidden, Head(kernel), targets, weights, chunk=512)[0]

    def logprobs(hidden, kernel, targets, weights):
        return (token_logprobs(hidden, Head(kernel), targets, chunk=512) * weights).sum()

    for function in (loss, logprobs):
        compiled = jax.jit(jax.grad(function, (0, 1))).lower(*shapes).compile()
        sizes = [
            np.prod([int(n) for n in dims.split(',')]) for dims in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
        ]
        assert max(sizes) <= 512 * vocab
        assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4


def test_bfloat16_hidden_gives_float32_loss():
    hidden, kernel, _, targets, weights = example(4, 2, 8, 16, 32)
    low = jnp.asarray(hidden, jnp.bfloat16)

    def loss(hidden, kernel):
        return cross_entropy(hidden, Head(kernel), targets, weights)[0]

    value, (d_hidden, d_kernel) = jax.value_and_grad(loss, (0, 1))(low, kernel)
    assert (value.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    chex.assert_trees_all_close(value, loss(hidden, kernel), rtol=2e-2)


@pytest.mark.parametrize('vocab_major', [True, False])
@pytest.mark.parametrize('ids', [tuple(range(32, 40)), (3, 7, 31, 32, 33)], ids=['beyond', 'some inside'])
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (1, 2, 4, 1), (2, 1, 2, 2)], ids=str)
def test_new_rows_beside_a_frozen_head(vocab_major, ids, sizes):
    """Loss, log-probabilities and their gradients are those of the whole kernel; the frozen part of it has none."""
    rng = np.random.default_rng(0)
    vocab = max(ids) + 1
    shapes = {'hidden': (8, 16, 8), 'rows': (len(ids), 8), 'bias': (vocab,)}
    hidden, rows, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes.values())
    base = jnp.asarray(rng.normal(size=(32, 8) if vocab_major else (8, 32)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (8, 16)), jnp.int32)
    weights = jnp.asarray(rng.random((8, 16)), jnp.float32)

    def leaf(rows):
        return NewRows(base, rows, ids, 0 if vocab_major else 1)

    def head(rows):
        return models.Head.of(leaf(rows), bias=bias, scale=0.5, vocab_major=vocab_major)

    def expected(hidden, rows):
        kernel = leaf(rows).materialise()
        found = jax.nn.log_softmax(0.5 * (hidden @ (kernel.T if vocab_major else kernel)) + bias)
        return -(weights * jnp.take_along_axis(found, targets[..., None], -1)[..., 0]).sum()

    def summed(hidden, rows):
        return cross_entropy(hidden, head(rows), targets, weights, chunk=5)[0]

    def by_token(hidden, rows):
        return -(weights * token_logprobs(hidden, head(rows), targets, chunk=5)).sum()

    wanted = jax.value_and_grad(expected, (0, 1))(hidden, rows)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        for function in (summed, by_token):
            made = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, rows)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), made, wanted)
