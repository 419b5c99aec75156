"""Slots: an answer is its own, whatever queue, slots, cache or mesh it is written in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import models
from jaxtune.generation.sampling import Sampling, pad_prompts, sample
from jaxtune.generation.slot_sampler import SlotSampler
from jaxtune.generation.slots import answer_keys
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.parallel import AXES, make_mesh

FIELDS = {
    'model_type': 'llama',
    'vocab_size': 61,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 256,
    'initializer_range': 0.5,
}
WINDOWS = FIELDS | {'model_type': 'mistral', 'sliding_window': 5}
EXPERTS = FIELDS | {'model_type': 'mixtral', 'num_local_experts': 4, 'num_experts_per_tok': 2}
ROOT = jax.random.key(3)
NEW = 20
SAMPLING = Sampling(NEW, stop_ids=(2, 5, 9), pad_id=60)


def model_of(fields):
    built = models.build(models.read_config(fields))
    return built, jax.jit(built.init)(jax.random.key(0))


def mesh_of(**sizes):
    sizes = dict.fromkeys(AXES, 1) | sizes
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.fixture(scope='module')
def llama():
    return model_of(FIELDS)


@pytest.fixture(scope='module')
def samplers(llama):
    """Samplers with so many slots and tokens of the cache at first, each compiled once for all examples."""
    made = {}

    def sampler(slots, room):
        if (slots, room) not in made:
            made[slots, room] = SlotSampler(llama[0], SAMPLING, mesh_of(), slots, ROOT, least_room=room)
        return made[slots, room]

    return sampler


@st.composite
def queues(draw):
    """Prompts with how many answers each gets, and their numbers; at most 8 of one length of padding."""
    counts = draw(st.lists(st.integers(1, 2), min_size=1, max_size=4))
    prompts = [draw(st.lists(st.integers(1, 59), min_size=1, max_size=30)) for _ in counts]
    numbers = draw(st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts), unique=True))
    return prompts, counts, numbers


@settings(deadline=None, max_examples=20, derandomize=True)
@given(queues(), st.sampled_from([(1, 128), (3, 128), (5, 33)]))
def test_an_answer_is_what_its_prompt_gets_alone(llama, samplers, queue, shape):
    """Bit for bit in as many slots, log-probabilities too; to the last bits in another number of slots.

    XLA may multiply another number of rows in another way.
    """
    prompts, counts, numbers = queue
    with jax.set_mesh(mesh_of()):
        together = samplers(*shape)([llama[1]], prompts, counts, numbers)
        at = 0
        for prompt, count, number in zip(prompts, counts, numbers, strict=True):
            same = samplers(*shape)([llama[1]], [prompt], [max(counts)], [number])
            other = samplers(4, 128)([llama[1]], [prompt], [2], [number])
            for part, own, near in zip(together, same, other, strict=True):
                np.testing.assert_array_equal(part[at : at + count], own[:count])
                np.testing.assert_allclose(part[at : at + count], near[:count], rtol=1e-4, atol=1e-5)
            at += count


def test_the_cache_grows_and_prompts_of_many_widths_are_read_apart(llama, samplers):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, size).tolist() for size in (40, 3, 200, 17, 130, 64, 5)]
    with jax.set_mesh(mesh_of()):
        together = samplers(3, 16)([llama[1]], prompts)
        for number, prompt in enumerate(prompts):
            alone = samplers(3, 16)([llama[1]], [prompt], numbers=[number], width=200)
            for part, own in zip(together, alone, strict=True):
                np.testing.assert_array_equal(part[number], own[0])


def test_no_slot_waits_while_there_are_answers_to_write(llama):
    sampler = SlotSampler(llama[0], Sampling(NEW), mesh_of(), 2, ROOT)
    with jax.set_mesh(mesh_of()):
        done = sampler([llama[1]], [[4, 5], [6]], [3, 3])
    assert (done.lengths == NEW).all()
    assert sampler.usage.steps == 3 * (NEW - 1)  # of two slots, for six answers whose first tokens cost no step
    assert sampler.usage.occupancy == 1
    assert sampler.usage.tokens == 6 * NEW
    assert len({tuple(row) for row in done.tokens}) == 6


@pytest.mark.parametrize('sizes', [{'data': 8}, {'fsdp': 4, 'tensor': 2}], ids=str)
def test_a_mesh_changes_no_answer(llama, samplers, sizes):
    prompts, counts, numbers = [[5, 9, 3], [7], [11, 12, 13, 14, 15], [4, 4]], [3, 2, 5, 1], [4, 0, 2, 9]
    with jax.set_mesh(mesh_of()):
        expected = samplers(3, 128)([llama[1]], prompts, counts, numbers)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        done = SlotSampler(llama[0], SAMPLING, mesh, 8, ROOT)([llama[1]], prompts, counts, numbers)
    np.testing.assert_array_equal(done.tokens, expected.tokens)
    np.testing.assert_allclose(done.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('fields', [FIELDS, WINDOWS, EXPERTS], ids=['llama', 'windows', 'experts'])
def test_log_probabilities_are_those_of_training(fields):
    model, params = model_of(fields)
    prompts, counts = [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16, 17]], [2, 1, 2]
    with jax.set_mesh(mesh_of()):
        done = SlotSampler(model, SAMPLING, mesh_of(), 2, ROOT)([params], prompts, counts)
    asked = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    for row, prompt in enumerate(asked):
        new = done.tokens[row, : done.lengths[row]]
        tokens = jnp.asarray([[*prompt, *new]])
        hidden = model.apply(params, {'tokens': tokens[:, :-1]}).hidden
        expected = token_logprobs(hidden, model.head(params), tokens[:, 1:])[0, len(prompt) - 1 :]
        np.testing.assert_allclose(done.logprobs[row, : len(new)], expected, rtol=1e-4, atol=5e-5)
        assert not done.logprobs[row, len(new) :].any()
        assert (done.tokens[row, len(new) :] == 60).all()


def test_answers_are_those_of_a_batch_with_the_same_keys(llama):
    model, params = llama
    prompts, numbers = [[5, 9, 3], [7], [11, 12, 13]], [0, 1, 2]
    tokens, lengths = pad_prompts(prompts, 60)
    keys = answer_keys(ROOT, jnp.asarray(numbers), jnp.zeros(3, jnp.int32))
    expected = jax.jit(lambda p: sample(model, SAMPLING, p, jnp.asarray(tokens), jnp.asarray(lengths), keys))(params)
    with jax.set_mesh(mesh_of()):
        done = SlotSampler(model, SAMPLING, mesh_of(), 2, ROOT)([params], prompts)
    np.testing.assert_array_equal(done.tokens, expected.tokens)
    np.testing.assert_allclose(done.logprobs, expected.logprobs, rtol=1e-4, atol=5e-5)
