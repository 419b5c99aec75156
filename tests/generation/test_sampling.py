"""Sampling: what a row gets depends on its own prompt and key alone, and its log-probabilities are the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxtune import models
from jaxtune.generation.sampling import Sampling, draw, filter_logits, pad_prompts, sample
from jaxtune.objectives.cross_entropy import token_logprobs

FIELDS = {
    'model_type': 'llama',
    'vocab_size': 61,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 128,
    'initializer_range': 0.5,
}
PROMPTS = [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16, 17], [4, 4]]


@pytest.fixture(scope='module')
def model():
    built = models.build(models.read_config(FIELDS))
    return built, jax.jit(built.init)(jax.random.key(0))


def run(model, prompts, numbers, **how):
    built, params = model
    sampling = Sampling(**{'max_new_tokens': 12, **how})
    tokens, lengths = pad_prompts(prompts, 0, multiple=8)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.asarray(numbers))
    return jax.tree.map(np.asarray, jax.jit(lambda p: sample(built, sampling, p, tokens, lengths, keys))(params))


def test_a_row_does_not_depend_on_the_others(model):
    together = run(model, PROMPTS, range(4))
    for row, prompt in enumerate(PROMPTS):
        alone = run(model, [prompt], [row])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    assert len({tuple(row) for row in run(model, [PROMPTS[0]] * 4, range(4)).tokens}) == 4


def test_logprobs_are_those_of_the_training_forward(model):
    built, params = model
    done = run(model, PROMPTS, range(4), temperature=0.7, top_k=20)
    for row, prompt in enumerate(PROMPTS):
        new = done.tokens[row, : done.lengths[row]]
        tokens = jnp.asarray([[*prompt, *new]])
        hidden = built.apply(params, {'tokens': tokens[:, :-1]}).hidden
        expected = token_logprobs(hidden, built.head(params), tokens[:, 1:])[0, len(prompt) - 1 :]
        np.testing.assert_allclose(done.logprobs[row, : len(new)], expected, rtol=1e-4, atol=1e-5)


def test_a_stop_token_ends_a_row_and_padding_follows(model):
    free = run(model, PROMPTS, range(4), temperature=0.0)
    stop = int(free.tokens[0, 4])
    stopped = run(model, PROMPTS, range(4), temperature=0.0, stop_ids=(stop,), pad_id=60)
    for row in range(4):
        ends = np.flatnonzero(free.tokens[row] == stop)
        length = ends[0] + 1 if len(ends) else 12
        assert stopped.lengths[row] == length
        np.testing.assert_array_equal(stopped.tokens[row, :length], free.tokens[row, :length])
        assert (stopped.tokens[row, length:] == 60).all()
        assert (stopped.logprobs[row, length:] == 0).all()


def test_frequencies_are_the_filtered_distribution(model):
    built, params = model
    prompt = PROMPTS[0]
    logits = built.logits(params, built.apply(params, {'tokens': jnp.asarray([prompt])}).hidden)[0, -1]
    expected = np.asarray(jax.nn.softmax(filter_logits(logits / 1.5, 8, 0.9)))
    drawn = run(model, [prompt] * 4000, range(4000), max_new_tokens=1, temperature=1.5, top_k=8, top_p=0.9)
    counts = np.bincount(drawn.tokens[:, 0], minlength=61) / 4000
    assert (counts[expected == 0] == 0).all()
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 4000))


@settings(deadline=None, max_examples=60)
@given(arrays.arrays(np.float32, (5, 17), elements=st.integers(-3, 3) | st.just(-np.inf)), st.integers(0, 99))
def test_tokens_are_drawn_as_jax_draws_categories(logits, seed):
    """Bit for bit, ties and forbidden tokens among them; the first of the likeliest at temperature 0."""
    logits[:, 3] = 0.0
    keys = jax.random.split(jax.random.key(seed), 5)
    expected = jax.vmap(jax.random.categorical)(keys, jnp.asarray(logits))
    np.testing.assert_array_equal(draw(jnp.asarray(logits), keys, Sampling(1)), expected)
    np.testing.assert_array_equal(draw(jnp.asarray(logits), keys, Sampling(1, temperature=0)), logits.argmax(-1))


def test_a_token_drawn_of_nothing_but_nan_is_one_of_the_vocabulary():
    logits = jnp.full((1, 17), jnp.nan)
    for temperature in (0.0, 1.0):
        assert 0 <= int(draw(logits, jax.random.split(jax.random.key(0), 1), Sampling(1, temperature))[0]) < 17


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(np.float32, (3, 17), elements=st.floats(-8, 8, width=32, allow_subnormal=False), unique=True),
    st.integers(0, 20),
    st.floats(0.05, 1.0),
)
def test_filters_keep_the_smallest_sufficient_set(logits, top_k, top_p):
    kept = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), top_k, top_p)))
    for row, mask in zip(logits, kept, strict=True):
        order = np.argsort(-row)
        allowed = order[: top_k if 0 < top_k < 17 else 17]
        chances = np.exp(row[allowed] - row[allowed].max())
        chances /= chances.sum()
        # A sum in float32 that meets top_p to its last bits may fall either way.
        sums = np.cumsum(chances, dtype=np.float64)
        fewest, most = (np.sum(sums < limit) + 1 if top_p < 1 else 17 for limit in (top_p - 1e-5, top_p + 1e-5))
        assert mask[order[0]]
        assert min(fewest, len(allowed)) <= mask.sum() <= min(most, len(allowed))
        assert set(np.flatnonzero(mask)) == set(order[: mask.sum()])
