"""Invariants of an update, for objectives, methods, families, optimizers and meshes drawn at random."""

import chex
import jax
import numpy as np
import pytest
from drawing import (
    CASES,
    DECODERS,
    ENCDECS,
    LENGTH,
    MESHES,
    METHODS,
    OPTIMIZERS,
    PACKED,
    ROWS,
    Combination,
    batch_of,
    draw,
    fresh_of,
    halves_of,
    lay_out,
    learning_of,
    method_of,
    model_of,
    random_of,
    run_of,
    segment,
    shapes_of,
    shared_of,
    to_numpy,
)

from jaxtune.methods import apply
from jaxtune.models.model import leaf_paths
from jaxtune.training import program as program_module
from jaxtune.training.step import gradients, make_train_step
from jaxtune.weights import eval_mode, tree

SPECS = draw(2, 46)
DIVIDED = draw(3, 3, meshes=MESHES)
# Experts on 2 and on 4 devices, whatever else is divided.
DIVIDED += [
    Combination('qwen3_moe', 'causal_lm', 'full', (1, 1, 1, 1, 2)),
    Combination('deepseek_v3', 'causal_lm', 'lora', (1, 1, 1, 1, 4)),
    Combination('qwen3_moe', 'sft', 'qlora', (1, 2, 2, 1, 2)),
    Combination('deepseek_v3', 'dpo', 'full', (1, 2, 1, 1, 4)),
    Combination('gpt2', 'distill', 'full', (2, 2, 2, 1)),
    Combination('llama', 'distill', 'qlora', (1, 4, 1, 2)),
]
UPDATED = [*DIVIDED, *draw(1, 2, optimizers=OPTIMIZERS)]
# An encoder's prompt sees the text, and serves one segment alone.
PACKABLE = [
    Combination('llama', 'distill', 'lora'),
    *draw(5, 2, [case for case in CASES if case[1] in PACKED and case[0] in DECODERS]),
    *draw(
        6, 3, [case for case in CASES if case[1] in PACKED and case[0] not in DECODERS], sorted({*METHODS} - {'prompt'})
    ),
]


def each(combinations):
    return pytest.mark.parametrize('c', combinations, ids=str)


def single(c):
    return Combination(c.family, c.learning, c.method)


@each(SPECS)
def test_loss_accepts_what_batch_spec_promises(c):
    spec, batch = learning_of(c).batch_spec(), batch_of(c, 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        batch, {name: np.zeros((ROWS, *field.shape), field.dtype) for name, field in spec.items()}
    )
    model = model_of(c)
    statistics = learning_of(c).statistics(model)
    for rng in (None, jax.random.key(0)):

        def loss(params, batch, rng=rng):
            means = {}
            if statistics is not None:
                means = {name: total / count for name, (total, count) in statistics(params, batch).items()}
            return learning_of(c).loss(model, params, batch | means | shared_of(c), rng)

        total, count, sums = jax.eval_shape(loss, shapes_of(c), batch)
        for value in jax.tree.leaves((total, count, sums)):
            chex.assert_shape(value, ())
            chex.assert_type(value, float)


@each(SPECS)
def test_gradients_are_of_the_trainable_leaves_alone(c):
    method, model = method_of(c).method, model_of(c)
    tuned = shapes_of(c)
    trainable, frozen = halves_of(c, tuned)
    test = apply.trains(method, fresh_of(c))
    everything = tree.paths(tuned)
    assert tree.paths(trainable) == [path for path in everything if test(path)]
    assert sorted(tree.paths(trainable) + tree.paths(frozen)) == sorted(everything)
    assert tree.combine(trainable, frozen) == tuned
    own = {path for path in leaf_paths(model.shapes) if path.split('/')[0] not in ('classifier', 'score', 'value')}
    assert own & set(tree.paths(trainable)) == (own if c.method == 'full' else set())

    learning = learning_of(c)

    def found(trainable, frozen, batch):
        loss = lambda params, batch, rng: learning.loss(model, params, batch, rng)  # noqa: E731
        return gradients(
            loss, trainable, frozen, batch | shared_of(c), jax.random.key(0), 1, learning.statistics(model)
        )[0]

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(found, trainable, frozen, batch_of(c, 0)), trainable)


@each(UPDATED)
def test_frozen_leaves_keep_their_bytes_and_the_others_stay_finite(c):
    run = run_of(c)
    before = to_numpy(run.frozen)
    state, metrics = run.updates(run.begin(), [0, 1])
    bytes_of = lambda values: jax.tree.map(lambda x: np.asarray(x).tobytes(), values)  # noqa: E731
    assert bytes_of(run.frozen) == bytes_of(before)
    # A half's structure says which leaves it has: nothing became trainable, nothing was lost.
    chex.assert_trees_all_equal_shapes_and_dtypes(state['trainable'], run.first)
    chex.assert_tree_all_finite((state, metrics))
    moved = jax.tree.map(lambda now, then: (np.asarray(now) != then).any(), state['trainable'], run.first)
    assert any(jax.tree.leaves(moved))


@each(UPDATED)
def test_a_restored_run_goes_on_bit_for_bit(c):
    run = run_of(c)
    whole, metrics = run.updates(run.begin(), range(4))
    whole = to_numpy(whole)
    state, first = run.updates(run.begin(), range(2))
    saved = to_numpy(state)
    del state
    resumed, rest = run.updates(run.restore(saved), range(2, 4))
    chex.assert_trees_all_equal(to_numpy(resumed), whole)
    assert first + rest == metrics


@each(UPDATED)
def test_an_update_is_traced_once(c, monkeypatch):
    def counted(*args, **keywords):
        return chex.assert_max_traces(make_train_step(*args, **keywords), n=1)

    chex.clear_trace_counter()  # it counts by a function's code, over all tests
    monkeypatch.setattr(program_module, 'make_train_step', counted)
    run = run_of.__wrapped__(c)
    run.updates(run.begin(), range(3))
    assert run.step._cache_size() == 1


def assert_same_update(c, run, other):
    """Both do the same update: parameters less their gradient, and metrics."""
    (one, metrics), (two, others) = run.updates(run.begin(), [0]), other.updates(other.begin(), [0])
    change = lambda state: jax.tree.map(lambda now, then: np.asarray(now) - then, state['trainable'], run.first)  # noqa: E731
    # float32 sums in another order: a part in 1e5 of the largest number, of a leaf's gradients or of what they are
    # added to.
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(change(one)))
    chex.assert_trees_all_close(change(two), change(one), rtol=1e-4, atol=2e-5 * max(largest, 1.0))
    chex.assert_trees_all_close(others, metrics, rtol=1e-4, atol=1e-5)


@each(DIVIDED)
def test_eight_devices_do_what_one_does(c):
    assert_same_update(c, run_of(single(c)), run_of(c))


@each(DIVIDED)
def test_four_micro_batches_are_one_batch(c):
    assert_same_update(c, run_of(single(c)), run_of(single(c), 4))


@each(PACKABLE)
def test_packed_rows_are_rows_of_their_own(c):
    learning, model = learning_of(c), model_of(c)
    spec, rng = learning.batch_spec(), np.random.default_rng(3)
    segments = [segment(spec, rng, LENGTH // 2) for _ in range(ROWS)]
    packed = lay_out(spec, [segments[at : at + 2] for at in range(0, ROWS, 2)])  # and as many empty rows
    apart = lay_out(spec, [[one] for one in segments])
    loss = jax.jit(lambda params, batch: learning.loss(model, eval_mode(params), batch | shared_of(c), None))
    found, expected = loss(random_of(c), packed), loss(random_of(c), apart)
    # T5 adds its biases of positions to scores that it does not scale: a little more rounding.
    chex.assert_trees_all_close(found, expected, rtol=1e-4 if c.family in ENCDECS else 2e-5, atol=1e-4)
    assert float(expected[1]) > 0
