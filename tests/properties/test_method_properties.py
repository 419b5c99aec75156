"""Invariants of tuning methods, for families and methods drawn at random."""

import functools

import chex
import jax
import numpy as np
import pytest
from drawing import (
    CASES,
    DECODERS,
    ENCDECS,
    ENCODERS,
    LENGTH,
    METHODS,
    ROWS,
    VOCAB,
    Combination,
    base_of,
    config_of,
    draw,
    method_of,
    model_of,
    random_of,
    stored_of,
    tuned_of,
)

from jaxtune.methods import targets
from jaxtune.weights import is_weight

_LM = [(f, 'causal_lm') for f in DECODERS] + [(f, 'masked_lm') for f in ENCODERS] + [(f, 'seq2seq') for f in ENCDECS]
WITHOUT_PROMPTS = [name for name in METHODS if name not in ('prompt', 'prefix')]
MIXTURES = [(family, 'causal_lm') for family in ('qwen3_moe', 'deepseek_v3')]
OF_EXPERTS = ('lora', 'dora', 'pissa', 'some layers', 'shared experts', 'qlora', 'qlora dora', 'houlsby')
DRAWN = list(dict.fromkeys(draw(11, 14, _LM, WITHOUT_PROMPTS) + draw(13, 8, MIXTURES, OF_EXPERTS)))
PROMPTED = draw(12, 3, [(family, 'causal_lm') for family in DECODERS], ('prompt', 'prefix'))


def inputs(c):
    rng = np.random.default_rng(0)
    batch = {'tokens': rng.integers(3, VOCAB, (ROWS, LENGTH), np.int32)}
    if c.family in ENCDECS:
        batch['decoder_tokens'] = rng.integers(3, VOCAB, (ROWS, 8), np.int32)
    return batch


@functools.cache
def _forward(family, model):
    return jax.jit(lambda params, batch: model.logits(params, model.apply(params, batch).hidden))


def logits(c, params, batch=None):
    model = model_of(c)
    return np.asarray(_forward(c.family, model)(params, inputs(c) if batch is None else batch))


@pytest.mark.parametrize('c', DRAWN, ids=str)
def test_a_method_begins_at_the_model(c):
    # DoRA divides each column by its norm and multiplies by it again; PiSSA takes off what it adds; new rows have a
    # product of their own.
    exact = c.method not in ('dora', 'qlora dora', 'pissa', 'new rows')
    base = logits(c, stored_of(c))
    tolerance = {} if exact else {'rtol': 1e-4, 'atol': 1e-5 * float(np.abs(base).max())}
    check = chex.assert_trees_all_equal if exact else chex.assert_trees_all_close
    check(logits(c, tuned_of(c)), base, **tolerance)


@pytest.mark.parametrize('c', PROMPTED, ids=str)
def test_a_prompt_begins_as_tokens_before_the_text(c):
    count = config_of(c).method.virtual_tokens
    chosen = jax.random.randint(jax.random.key(method_of(c).seed), (count,), 0, VOCAB)
    text = np.concatenate([np.tile(chosen, (ROWS, 1)), inputs(c)['tokens']], axis=1)
    expected = logits(c, stored_of(c), {'tokens': text})[:, count:]
    chex.assert_trees_all_close(logits(c, tuned_of(c)), expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize('c', DRAWN, ids=str)
def test_merged_weights_compute_the_same(c):
    params = random_of(c)
    merged = method_of(c).method.merge(params)
    assert not any(is_weight(leaf) for leaf in jax.tree.leaves(merged, is_leaf=is_weight))
    if c.method not in ('houlsby', 'pfeiffer'):  # which stay where they are: no kernel could hold them
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, base_of(c))
    expected = logits(c, params)
    # A product with the sum of two matrices, in place of the sum of two products.
    tolerance = 1e-5 * float(np.abs(expected).max())
    chex.assert_trees_all_close(logits(c, merged), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(('family', 'learning'), CASES)
def test_heads_are_not_among_all_linear(family, learning):
    """A head that its model's folder has is the task's own all the same: no adapter wraps it, nothing quantises it."""
    model = model_of(Combination(family, learning, 'lora'))
    chosen = targets.select(model, 'all-linear')
    assert set(chosen) == set(targets.linear(model))
    assert not {path.split('/')[0] for path in chosen} & {'classifier', 'score', 'value'}
