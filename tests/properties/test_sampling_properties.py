"""Invariants of sampling and of reinforcement learning, for families, methods and sampling settings drawn at random."""

import functools
import itertools
import random
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import (
    DECODERS,
    ONE,
    REWARDED,
    draw,
    halves_of,
    learning_of,
    mesh_of,
    model_of,
    random_batch,
    random_of,
)

from jaxtune.generation.sampling import Sampling
from jaxtune.generation.slot_sampler import SlotSampler
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.rl import RolloutBatch
from jaxtune.rl.scoring import Scorer
from jaxtune.weights import eval_mode

NEW, PROMPTS = 6, [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16, 17], [4, 4]]
HOW = tuple(
    {'temperature': t, 'top_k': k, 'top_p': p} for t, k, p in itertools.product((0.0, 0.7, 1.0), (0, 9), (1.0, 0.8))
)
SAMPLED = [
    (c, random.Random(number).choice(HOW))
    for number, c in enumerate(draw(21, 3, [(family, 'causal_lm') for family in DECODERS]))
]
SAMPLED += [(c, HOW[-1]) for c in draw(22, 1, [('t5', 'seq2seq'), ('umt5', 'seq2seq')], ('full', 'lora', 'qlora'))]
ALGORITHMS = draw(23, 4, [(family, name) for family in DECODERS for name in REWARDED])


@functools.cache
def sampler(model, how):
    return SlotSampler(model, Sampling(NEW, stop_ids=(2,), **dict(how)), mesh_of(ONE), 2, jax.random.key(3))


def answers(c, how, rows):
    """Answers to these prompts in two slots."""
    with jax.set_mesh(mesh_of(ONE)):
        return sampler(model_of(c), tuple(how.items()))([random_of(c)], [PROMPTS[row] for row in rows], numbers=rows)


@pytest.mark.parametrize(('c', 'how'), SAMPLED, ids=str)
def test_log_probabilities_of_the_sampler_are_those_of_training(c, how):
    model = model_of(c)
    done, params = answers(c, how, range(4)), random_of(c)
    rows = np.zeros((4, 8 + NEW), np.int32)
    for row, prompt in enumerate(PROMPTS):
        new = done.tokens[row, : done.lengths[row]]
        rows[row, : len(prompt) + len(new)] = [*prompt, *new]
    lengths = np.asarray([len(prompt) for prompt in PROMPTS])
    if model.kind == 'decoder':
        ends = lengths + done.lengths
        places = np.broadcast_to(np.arange(8 + NEW, dtype=np.int32), rows.shape)
        batch = {'tokens': rows, 'positions': places, 'segment_ids': (places < ends[:, None]).astype(np.int32)}
        targets, first = np.roll(rows, -1, axis=1), lengths - 1
    else:
        source = np.where(np.arange(8) < lengths[:, None], rows[:, :8], 0)
        shifted = np.concatenate([np.full((4, 1), model.config.start_id), done.tokens[:, :-1]], axis=1)
        batch = {'tokens': source, 'segment_ids': (np.arange(8) < lengths[:, None]).astype(np.int32)}
        batch |= {'decoder_tokens': shifted.astype(np.int32), 'decoder_segment_ids': np.ones((4, NEW), np.int32)}
        targets, first = done.tokens, np.zeros(4, int)

    def score(params, batch):
        return token_logprobs(model.apply(params, batch).hidden, model.head(params), targets)

    scored = np.asarray(jax.jit(score)(params, batch))
    for row, count in enumerate(done.lengths):
        expected = scored[row, first[row] : first[row] + count]
        # One token at a time against all at once: other shapes of the same float32 products.
        chex.assert_trees_all_close(done.logprobs[row, :count], expected, rtol=1e-4, atol=5e-5)
        assert not done.logprobs[row, count:].any()


@pytest.mark.parametrize(('c', 'how'), SAMPLED, ids=str)
def test_an_answer_does_not_depend_on_the_rest_of_its_batch(c, how):
    together = answers(c, how, range(4))
    for row in range(4):
        alone = answers(c, how, [row] * 4)
        for copy in range(4):
            chex.assert_trees_all_equal(alone.tokens[copy], together.tokens[row])
            chex.assert_trees_all_equal(alone.lengths[copy], together.lengths[row])
            chex.assert_trees_all_close(alone.logprobs[copy], together.logprobs[row], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize('c', ALGORITHMS, ids=str)
def test_nothing_has_left_the_reference_before_the_first_update(c):
    algorithm, model = learning_of(c), model_of(c)
    trainable, frozen = halves_of(c, random_of(c))
    spec = {name: field for name, field in algorithm.batch_spec().items() if name != 'places'}
    batch = random_batch(spec, np.random.default_rng(5))
    with jax.set_mesh(mesh_of(ONE)):
        scorer = Scorer(algorithm, types.SimpleNamespace(model=model, mesh=mesh_of(ONE)), 8, False)
        scorer.logps = True
        scored = scorer.score_rows((trainable, frozen), (jax.tree.map(jnp.copy, trainable), frozen), batch)
        chex.assert_trees_all_equal(scored['old'], scored['reference'])
        assert float(jnp.abs(scored['old']).sum()) > 0
        scores = np.random.default_rng(6).normal(size=len(batch['tokens'])).astype(np.float32)
        rollouts = RolloutBatch(**scored, mask=batch['loss_mask'], scores=scores)
        compute_advantages = algorithm.algorithm.compute_advantages
        fields, _ = jax.jit(lambda rollouts: compute_advantages(algorithm.settings, rollouts))(rollouts)
        loss = jax.jit(lambda params, batch: algorithm.loss(model, eval_mode(params), batch, None))
        _, count, sums = loss(random_of(c), batch | fields)
    assert sums['clip_fraction'] == 0
    kl = {name: sums[name] / count for name in ('approx_kl', 'reference_kl') if name in sums}
    # Two programs with the same products: their log-probabilities may differ in the last bit.
    chex.assert_trees_all_close(kl, dict.fromkeys(kl, jnp.float32(0)), atol=1e-6)
    assert kl
