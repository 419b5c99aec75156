"""The chunked divergence from a teacher beside TRL's loss and the plain formula: values, gradients, meshes, memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.model import Head
from jaxtune.objectives.divergence import distillation
from jaxtune.parallel import AXES, make_mesh

BATCH, LENGTH, WIDTH, TEACHERS_WIDTH = 4, 6, 16, 24


def example(vocab, teachers_vocab, vocab_major=True, bias=False):
    rng = np.random.default_rng(0)

    def side(width, size):
        hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, width)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(size, width) if vocab_major else (width, size)), jnp.float32)
        return hidden, kernel, jnp.asarray(rng.normal(size=size), jnp.float32) if bias else None

    targets = jnp.asarray(rng.integers(0, vocab, (BATCH, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.random((BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.7), jnp.float32)
    return side(WIDTH, vocab), side(TEACHERS_WIDTH, teachers_vocab), targets, weights


def plain(student, teacher, targets, weights, beta, temperature, share):
    """The loss of logits `[batch, length, vocab]`, of which the first ones that both have are compared."""
    nll = -jnp.take_along_axis(jax.nn.log_softmax(student), targets[..., None], -1)[..., 0]
    common = min(student.shape[-1], teacher.shape[-1])
    log_p = jax.nn.log_softmax(student[..., :common] / temperature)
    log_q = jax.nn.log_softmax(teacher[..., :common] / temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if beta == 0:
        found = q * (log_q - log_p)
    elif beta == 1:
        found = p * (log_p - log_q)
    else:
        log_m = jnp.log((1 - beta) * p + beta * q)
        found = beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    found = found.sum(-1)
    return (weights * ((1 - share) * nll + share * found)).sum(), (weights * nll).sum(), (weights * found).sum()


@pytest.mark.parametrize('beta', [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('temperature', [0.7, 1.0, 3.0])
def test_equals_trls_loss_on_the_same_logits(beta, temperature):
    torch = pytest.importorskip('torch')
    trainer = pytest.importorskip('trl.experimental.gkd.gkd_trainer').GKDTrainer
    rng = np.random.default_rng(1)
    student, teacher = (3 * rng.normal(size=(2, 8, 40)).astype(np.float32) for _ in range(2))
    labels = np.where(rng.random((2, 8)) < 0.3, -100, 7)
    expected = trainer.generalized_jsd_loss(
        torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), beta, temperature
    ).item()
    head, mask = Head(jnp.eye(40)), jnp.asarray(labels != -100, jnp.float32)
    sums = distillation(student, head, teacher, head, jnp.asarray(labels), mask, beta=beta, temperature=temperature)
    assert float(sums.divergence / mask.sum()) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_array_equal(sums.loss, sums.divergence)


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (1, 2, 2, 2), (1, 8, 1, 1), (2, 1, 4, 1)], ids=str)
@pytest.mark.parametrize(
    ('vocab', 'teachers_vocab', 'vocab_major', 'softcap', 'biased', 'beta', 'share'),
    [
        (48, 48, True, None, False, 0.0, 1.0),
        (48, 64, False, 2.0, True, 0.3, 0.6),
        (64, 40, True, None, True, 1.0, 0.6),
        (1024, 1024, True, None, False, 1.0, 0.5),  # the kernel of a CPU is filled up
    ],
)
def test_values_and_gradients_are_those_of_the_whole_logits(
    sizes, vocab, teachers_vocab, vocab_major, softcap, biased, beta, share
):
    student, teacher, targets, weights = example(vocab, teachers_vocab, vocab_major, biased)
    layout = {'softcap': softcap, 'scale': 0.5, 'vocab_major': vocab_major}

    def ours(*student):
        head, theirs = Head(*student[1:], **layout), Head(*teacher[1:], **layout)
        sums = distillation(
            student[0], head, teacher[0], theirs, targets, weights, beta=beta, temperature=1.5, share=share, chunk=5
        )
        return 1.7 * sums.loss, (sums.nll, sums.divergence)

    def wanted(*student):
        sides = (Head(*side[1:], **layout).logits(side[0]) for side in (student, teacher))
        loss, *terms = plain(*sides, targets, weights, beta, 1.5, share)
        return 1.7 * loss, tuple(terms)

    which = (0, 1, 2) if biased else (0, 1)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(ours, which, has_aux=True))(*student)
    expected = jax.value_and_grad(wanted, which, has_aux=True)(*student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0])
def test_of_equal_distributions_it_is_zero_and_of_disjoint_ones_finite(beta):
    student, _, targets, weights = example(32, 32)

    def loss(hidden, theirs):
        head = Head(student[1], vocab_major=True)
        return distillation(hidden, head, theirs, head, targets, weights, beta=beta).loss

    value, grad = jax.value_and_grad(loss)(student[0], student[0])
    assert abs(float(value)) < 1e-5
    np.testing.assert_allclose(grad, 0, atol=1e-5)
    value, grad = jax.value_and_grad(loss)(student[0], -100 * student[0])
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert float(value) > 0.1


def test_no_gradient_goes_to_the_teacher():
    student, teacher, targets, weights = example(32, 32)

    def loss(hidden, kernel):
        theirs = Head(kernel, vocab_major=True)
        head = Head(student[1], vocab_major=True)
        return distillation(student[0], head, hidden, theirs, targets, weights, beta=0.5).loss

    for grad in jax.grad(loss, (0, 1))(*teacher[:2]):
        assert not np.asarray(grad).any()


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0])
def test_never_holds_all_logits_of_either_side(beta):
    batch, length, vocab, chunk = 2, 2048, 4096, 128
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shapes = [float32(batch, length, 8), float32(vocab, 8), float32(batch, length, 16), float32(vocab, 16)]

    def loss(hidden, kernel, their_hidden, theirs, targets, weights):
        heads = (Head(x, vocab_major=True) for x in (kernel, theirs))
        return distillation(
            hidden, next(heads), their_hidden, next(heads), targets, weights, beta=beta, share=0.5, chunk=chunk
        ).loss

    shapes += [jax.ShapeDtypeStruct((batch, length), jnp.int32), float32(batch, length)]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    sizes = [np.prod([int(n) for n in dims.split(',')]) for dims in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())]
    assert max(sizes) <= chunk * (vocab + 16)
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 4
