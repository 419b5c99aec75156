"""The engine: requests that come and go, each answered as if it were alone."""

import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import models
from jaxtune.generation import sampling
from jaxtune.generation.engine import Ask, End, Engine, Full
from jaxtune.generation.host_slots import Programs, lay_out
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
WINDOWS = FIELDS | {'model_type': 'mistral', 'sliding_window': 5, 'tie_word_embeddings': True}
EXPERTS = FIELDS | {'model_type': 'mixtral', 'num_local_experts': 4, 'num_experts_per_tok': 2}
STOPS = (2, 5)


def mesh_of(**sizes):
    sizes = dict.fromkeys(AXES, 1) | sizes
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def model_of(fields):
    built = models.build(models.read_config(fields))
    return built, jax.jit(built.init)(jax.random.key(0))


class Answers:
    """Engines of one model, and answers as lists."""

    def __init__(self, fields, stops=STOPS, slots=5):
        self.model, self.params = model_of(fields)
        self.programs = Programs(self.model, mesh_of(), slots, stops)
        self.laid = lay_out(self.model, mesh_of(), {'': self.params})['']
        self.engines = []

    def engine(self, **options):
        self.engines.append(Engine(self.programs, self.laid, **options))
        return self.engines[-1]

    def close(self):
        for engine in self.engines:
            engine.close()


def ask_all(engine, asks):
    """`(tokens, logprobs, alternatives, scores, end)` of each, asked at once."""
    events = [queue.Queue() for _ in asks]
    engine.submit(asks, [one.put for one in events])
    answers = []
    for own in events:
        tokens, logprobs, others, scores = [], [], [], None
        while not isinstance(event := own.get(timeout=120), End):
            if event.of_prompt:
                scores = event
                continue
            tokens += event.tokens
            logprobs += event.logprobs
            others += event.alternatives
        answers.append((tokens, logprobs, others, scores, event))
    return answers


@pytest.fixture(scope='module')
def llama():
    made = Answers(FIELDS)
    made.running = made.engine()
    yield made
    made.close()


asks = st.builds(
    Ask,
    prompt=st.lists(st.integers(1, 60), min_size=1, max_size=40).map(tuple),
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    seed=st.integers(0, 2**40),
    sample=st.integers(0, 3),
    alternatives=st.booleans(),
    hurried=st.booleans(),
)


@settings(deadline=None, max_examples=4, derandomize=True)
@given(st.lists(asks, min_size=32, max_size=32))
def test_an_answer_is_the_same_among_others_and_alone(llama, wanted):
    together = ask_all(llama.running, wanted)
    for ask, (tokens, logprobs, others, _, end) in list(zip(wanted, together, strict=True))[::3]:
        ((own, near, own_others, _, own_end),) = ask_all(llama.running, [ask])
        assert tokens == own
        assert end == own_end
        np.testing.assert_allclose(logprobs, near, atol=1e-5)
        assert len(others) == len(own_others) == (len(tokens) if ask.alternatives else 0)
    for ask, (tokens, *_, end) in zip(wanted, together, strict=True):
        assert end.reason == ('stop' if tokens[-1] in STOPS else 'length')
        assert len(tokens) <= ask.max_tokens
        assert not set(tokens[:-1]) & set(STOPS)


@pytest.mark.parametrize('settings', [(0.0, 0, 1.0), (0.8, 0, 1.0), (1.0, 7, 0.8)], ids=str)
def test_answers_are_those_of_the_sampler_with_the_same_keys(llama, settings):
    prompt = [5, 9, 3, 11]
    temperature, top_k, top_p = settings
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), 1)
    how = sampling.Sampling(20, temperature, top_k, top_p, stop_ids=STOPS)
    arguments = llama.params, jnp.asarray([prompt]), jnp.asarray([4]), key[None]
    expected = jax.jit(lambda *args: sampling.sample(llama.model, how, *args))(*arguments)
    ((tokens, logprobs, *_),) = ask_all(
        llama.running, [Ask(tuple(prompt), 20, temperature, top_k, top_p, seed=7, sample=1)]
    )
    assert tokens == expected.tokens[0, : expected.lengths[0]].tolist()
    np.testing.assert_allclose(logprobs, expected.logprobs[0, : len(tokens)], atol=1e-5)


@pytest.mark.parametrize('fields', [FIELDS, WINDOWS, EXPERTS], ids=['llama', 'windows', 'experts'])
def test_log_probabilities_are_the_models_own(fields):
    made = Answers(fields, stops=(), slots=2)
    engine = made.engine()
    wanted = [Ask(tuple(range(1, count + 1)), 12, seed=count, alternatives=True, scored=True) for count in (1, 7, 40)]
    for ask, (tokens, logprobs, others, scores, _) in zip(wanted, ask_all(engine, wanted), strict=True):
        row = jnp.asarray([[*ask.prompt, *tokens]])
        hidden = made.model.apply(made.params, {'tokens': row[:, :-1]}).hidden
        head = made.model.head(made.params)
        expected = token_logprobs(hidden, head, row[:, 1:])[0]
        np.testing.assert_allclose([*scores.logprobs, *logprobs], expected, atol=1e-4)
        assert scores.tokens == list(ask.prompt[1:])
        all_others = np.asarray([[logprob for _, logprob in one] for one in scores.alternatives + others])
        best = jax.lax.top_k(jax.nn.log_softmax(head.logits(hidden[0])), 20)[0]
        np.testing.assert_allclose(all_others, best, atol=1e-4)
    made.close()


def test_scores_alone_take_no_slot_and_a_cache_grows_to_the_models_positions(llama):
    engine = llama.engine()
    (tokens, _, _, scores, end), (long, *_, last) = ask_all(
        engine, [Ask((4, 8, 15), 0, scored=True), Ask(tuple([3, 7] * 50), 156, seed=1)]
    )
    assert (tokens, end.reason, len(scores.tokens)) == ([], 'length', 2)
    assert last.reason == 'stop' or len(long) == 156
    with pytest.raises(ValueError, match='100 \\+ 157 tokens: expected 1 to 256'):
        engine.submit([Ask(tuple([3] * 100), 157)], [print])
    with pytest.raises(ValueError, match='0 \\+ 1 tokens'):
        engine.submit([Ask((), 1)], [print])


def test_who_goes_away_frees_the_slot_and_a_full_queue_takes_no_more(llama):
    programs = Programs(llama.model, mesh_of(), 1, ())
    engine = Engine(programs, llama.laid, max_queue=1)
    began, told = threading.Event(), []

    def listen(event):
        told.append(event)
        began.set()

    (first,) = engine.submit([Ask((3,), 250, hurried=True)], [listen])
    assert began.wait(120)
    (second,) = engine.submit([Ask((4,), 250)], [print])
    with pytest.raises(Full):
        engine.submit([Ask((5,), 2)], [print])
    second.cancel()
    first.cancel()
    ((tokens, *_, end),) = ask_all(engine, [Ask((6,), 3)])
    assert (len(tokens), end.reason) == (3, 'length')
    assert sum(len(event.tokens) for event in told if not isinstance(event, End)) < 250
    assert engine.running == engine.waiting == 0
    engine.close()
    assert not engine.alive
    ((*_, end),) = ask_all(engine, [Ask((6,), 3)])
    assert end == End('failed', 'the server is stopping')


def test_what_fails_ends_those_it_meets_and_no_others(llama, monkeypatch):
    engine = llama.engine()
    grow = llama.programs.grow

    def refuse(state, room):
        raise MemoryError(f'{room} tokens')

    monkeypatch.setattr(llama.programs, 'grow', refuse)
    programs = Programs(llama.model, mesh_of(), 2, ())
    monkeypatch.setattr(programs, 'grow', refuse)
    engine = Engine(programs, llama.laid)
    long, short = ask_all(engine, [Ask(tuple([3] * 100), 100), Ask((5,), 60)])
    assert long[-1].reason == 'failed'
    assert long[-1].message.startswith('out of memory')
    assert (len(short[0]), short[-1].reason) == (60, 'length')
    monkeypatch.setattr(programs, 'write', lambda *args, **kwargs: 1 / 0)
    ((*_, end),) = ask_all(engine, [Ask((5,), 60)])
    assert end == End('failed', 'ZeroDivisionError: division by zero')
    monkeypatch.undo()
    assert llama.programs.grow is grow
    ((tokens, *_),) = ask_all(engine, [Ask((5,), 4)])
    assert len(tokens) == 4
    engine.close()


def test_heads_may_be_divided():
    made = Answers(FIELDS, slots=2)
    mesh = mesh_of(tensor=2)
    programs = Programs(made.model, mesh, 2, STOPS)
    engine = Engine(programs, lay_out(made.model, mesh, {'': made.params})[''])
    ask = Ask((3, 4, 5), 20, seed=3)
    ((tokens, logprobs, *_),) = ask_all(engine, [ask])
    ((own, near, *_),) = ask_all(made.engine(), [ask])
    assert tokens == own
    np.testing.assert_allclose(logprobs, near, atol=1e-5)
    engine.close()
    made.close()


def test_trees_share_what_they_have_in_common(llama):
    other = {**llama.params, 'norm': jax.tree.map(lambda x: x + 1, llama.params['norm'])}
    laid = lay_out(llama.model, mesh_of(), {'base': llama.params, 'tuned': other})
    theirs = {id(leaf) for leaf in jax.tree.leaves(laid['base'])}
    assert [id(leaf) in theirs for leaf in jax.tree.leaves(laid['tuned'])].count(False) == 1
