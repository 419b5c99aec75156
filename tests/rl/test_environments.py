"""Environments: what they are asked, what goes wrong with one's own, and what of an exchange is learnt."""

import dataclasses
import fractions
import re

import jax
import numpy as np
import pytest

from jaxtune.data.templates import Template
from jaxtune.errors import StepError, UserError
from jaxtune.generation import stop_texts
from jaxtune.generation.prompts import Prompt
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.rl import Problem, calculator, guess, python_tool, sandbox, tool_calls
from jaxtune.rl.environments import RunningEnvironment, check_references
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.policy import per_token_logps
from jaxtune.rl.replies import Part, ReplyEncoder
from jaxtune.rl.rollouts import Sampler
from jaxtune.tasks import specs

OWN = """
import dataclasses
import time

from jaxtune.rl import Environment


def reset(problem):
    return {'turns': 0, 'words': problem.prompt}


def step(state, text):
    state['turns'] += 1
    return state, f"[{state['turns']}{text[-1:]}]", 0.5, state['turns'] == 3


ECHO = Environment('echo', reset, step, stops=tuple('abcdefghijklmnopqrstuvwxyz'), references=True)
OVER = dataclasses.replace(ECHO, stops=(), step=lambda state, text: (state, None, 1.0, True))
RAISES = dataclasses.replace(ECHO, step=lambda state, text: (state, 'x', 1 / len(text), False))
NAN = dataclasses.replace(ECHO, step=lambda state, text: (state, 'x', float('nan'), False))
SHORT = dataclasses.replace(ECHO, step=lambda state, text: (state, 'x'))
NUMBER = dataclasses.replace(ECHO, step=lambda state, text: (state, 7, 0.0, False))
STATE = dataclasses.replace(ECHO, reset=lambda problem: {1, 2})
SLOW = dataclasses.replace(ECHO, step=lambda state, text: time.sleep(60))
ROLE = dataclasses.replace(ECHO, role='system')
"""
NEW, LENGTH, COUNT = 24, 48, 8
PROMPTS = [Prompt(text, list(text.encode()), text) for text in ('seven? ', 'a fox? ', 'why, then? ', '2 + 2? ')]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a name of `OWN`, or a shipped one."""
    (tmp_path / 'mine.py').write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def opened(name, **keys):
        config = recipes.defaults()
        name = name if name.islower() else f'mine.py:{name}'
        recipes.apply_overrides(config, {'rl.environment': name, **{f'rl.{key}': x for key, x in keys.items()}})
        return RunningEnvironment(config.rl)

    return opened


def test_states_are_kept_apart_and_steps_answered_in_their_order(opened):
    echo = opened('ECHO')
    echo.reset(PROMPTS[:3])
    assert [reply[1:] for reply in echo.step([0, 2], ['x', 'y'])] == [('[1x]', 0.5, False), ('[1y]', 0.5, False)]
    replies = echo.step([2, 1, 0], ['', 'b', 'c'])
    assert [reply.text for reply in replies] == ['[2]', '[1b]', '[2c]']
    assert [reply.done for reply in echo.step([0, 1], ['', ''])] == [True, False]
    assert (echo.role, len(echo.stops), echo.references) == ('tool', 26, True)
    check_references(echo, PROMPTS)
    with pytest.raises(UserError, match=r"1 of 5 prompts have none, such as 'x'"):
        check_references(echo, [*PROMPTS, Prompt('x', [1])])


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('RAISES', r"mine.py:\d+: ZeroDivisionError: division by zero; it fails on the turn ''"),
        ('NAN', r"returned the reward nan; expected a finite number; it fails on the turn 'a'"),
        ('SHORT', r'expected \(state, reply, reward, done\)'),
        ('NUMBER', 'returned the reply 7; expected a text, or None'),
        ('STATE', r'its state \{1, 2\} is not of JSON values .* it fails on the prompt'),
        ('SLOW', "has not returned after 0.3 seconds; expected it within rl.reward_timeout; it was asked about 'a' an"),
    ],
)
def test_what_one_does_instead_is_said_with_the_sample(opened, name, said):
    environment = opened(name)
    environment._process.seconds = 0.3 if name == 'SLOW' else 60.0

    def ask():
        environment.reset(PROMPTS[:2])
        environment.step([0, 1], ['a', ''])

    with pytest.raises(StepError, match=said) as caught:
        ask()
    assert str(caught.value).startswith(f'rl.environment=mine.py:{name}: ')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('name', 'said'),
    [('ROLE', "its role is 'system'; expected tool or user"), ('GONE', "has no 'GONE'"), ('reset', 'expected')],
)
def test_what_is_none_is_refused_at_once(opened, name, said):
    with pytest.raises(UserError, match=said):
        opened(name) if name != 'reset' else RunningEnvironment(_settings('mine.py:reset'))


def _settings(name):
    config = recipes.defaults()
    recipes.apply_overrides(config, {'rl.environment': name})
    return config.rl


@pytest.mark.parametrize(
    ('expression', 'value'),
    [
        ('12+34', '46'), ('2 × (3 − 1)', '4'), ('1/3', '0.333333333333'), ('-7 // 2', '-4'), ('7 % 4', '3'),
        ('2^10 =', '1024'), ('1,000 * 2', '2000'), ('0.1 + 0.2', '0.3'), ('1/0', 'error: division by 0'),
        ('9**9**9', 'error: expected a small whole exponent'), ('10**59 * 10', 'error: more than 60 digits'),
        ('abs(1)', 'error: expected numbers'), ('"a" * 9', 'error: expected numbers'), ('(' * 150, 'error: no exp'),
        ('1' * 300, 'error: longer than 200 characters'), ('True + 1', 'error: expected numbers'),
    ],
)  # fmt: skip
def test_calculator(expression, value):
    state, reply, reward, done = calculator.step(None, f'so <calc>{expression}</calc>')
    assert reply.startswith(f' = {value}')
    assert value.startswith('error') or reply == f' = {value}'
    assert (state, reward, done) == (None, 0.0, False)


def test_calculator_is_exact_and_answers_calls_of_the_tool():
    assert calculator.calculate('1/3 + 1/6') == fractions.Fraction(1, 2)
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2 * 3"}}\n</tool_call>'
    assert calculator.step(None, call) == (None, '6', 0.0, False)
    assert calculator.step(None, 'it is 6') == (None, None, 0.0, True)


@pytest.mark.parametrize(
    'text',
    [
        'hm\n<tool_call>\n{"name": "f", "arguments": {"x": "1"}}\n</tool_call>',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": "1"}}]',
        '{"name": "f", "parameters": {"x": "1"}}',
        '<tool_call>{"function": {"name": "f", "arguments": "{\\"x\\": \\"1\\"}"}}',
    ],
)
def test_calls_of_tools_are_found_in_the_forms_of_published_models(text):
    assert tool_calls.find(text) == [('f', {'x': '1'})]
    assert tool_calls.find(text.replace('"name"', 'name')) == []


@pytest.mark.skipif(bool(sandbox.unavailable(sandbox.Limits())), reason='the system has no namespaces')
def test_python(opened):
    environment = opened('python', code_seconds=1.0, code_memory=256)
    environment.reset(PROMPTS[:4])
    texts = ['<python>print(12 + 34)</python>', '<python>\nprint(1)\n1 / 0\n</python>', 'so', '<python>x</python>']
    replies = environment.step(range(4), texts)
    assert replies[0].text == '\n<output>\n46\n</output>\n'
    assert replies[1].text == '\n<output>\n1\nZeroDivisionError: division by zero\n</output>\n'
    assert (replies[2].text, replies[2].done) == (None, True)
    assert "NameError: name 'x' is not defined" in replies[3].text
    long = python_tool.step(None, '<python>print("é" * 5000)</python>', seconds=5.0, memory=256, unsafe=False)[1]
    assert long == f'\n<output>\n{"é" * 1000}…\n</output>\n'
    assert 'has not ended after 1 seconds' in environment.step([0], ['<python>while True: pass</python>'])[0].text


def test_guess():
    state = guess.reset(Problem('which?', 'it is 42'))
    assert guess.step(state, '<guess>50</guess>') == (state, ' lower', 0.0, False)
    assert guess.step(state, 'is it 7 or 41?') == (state, 'higher', 0.0, False)
    assert guess.step(state, '<guess>42</guess>') == (state, None, 1.0, True)
    assert guess.step(state, 'no idea')[3]
    assert guess.reset(Problem('which?')) == guess.reset(Problem('which?'))
    assert 1 <= guess.reset(Problem('which?'))['number'] <= 100


@pytest.fixture(scope='module')
def bundle():
    """A small model over bytes that writes letters as likely as anything."""
    config = recipes.defaults()
    fields = {'model_type': 'llama', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 1}
    fields |= {'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 128}
    fields |= {'initializer_range': 0.5}
    recipes.apply_overrides(
        config, {'tokenizer.path': 'bytes', 'model.config': fields, 'data.train': 'x', 'data.seq_len': 64}
    )
    mesh = one_device()
    with jax.set_mesh(mesh):
        return load_model(specs.model_spec(config), mesh)


def one_device():
    return make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def sampled(bundle, environment, slots=COUNT, max_turns=8, prompts=None):
    config = recipes.defaults()
    recipes.apply_overrides(config, {'generate.max_new_tokens': NEW, 'generate.batch_size': slots})
    prompts = prompts or [prompt for prompt in PROMPTS for _ in range(4)]
    mesh = one_device()
    with jax.set_mesh(mesh):
        exchange = environment and (environment, max_turns, None)
        sampler = Sampler(config.generate, mesh, bundle, prompts, LENGTH, 3, exchange)
        return sampler(bundle.params, jax.tree.map(lambda _: None, bundle.params), prompts, 5)


@pytest.fixture(scope='module')
def made(bundle, tmp_path_factory):
    """Exchanges with `ECHO`."""
    path = tmp_path_factory.mktemp('own') / 'mine.py'
    path.write_text(OWN)
    return sampled(bundle, RunningEnvironment(_settings(f'{path}:ECHO')))


def test_a_turn_that_ends_everything_is_the_answer_without_an_environment(bundle, opened):
    alone, over = sampled(bundle, None), sampled(bundle, opened('OVER'))
    for name in ('tokens', 'start', 'end', 'ended', 'logprobs', 'own', 'lengths'):
        np.testing.assert_array_equal(getattr(alone, name), getattr(over, name), err_msg=name)
    assert list(alone.texts) == list(over.texts)
    assert over.rewards.tolist() == alone.ended.astype(float).tolist()  # a turn that was cut is not asked about


def test_what_is_learnt_of_an_exchange_is_what_the_policy_wrote(bundle, made):
    assert made.inserted.any()
    assert {0, 1, 2, 3} >= set(made.turns.tolist()) > {1, 2}
    for row, parts in enumerate(made.parts):
        replies = [part.text for part in parts if part.who == 'environment']
        turns = [part.text for part in parts if part.who == 'model']
        assert [re.fullmatch(r'\[(\d)(.)\]', reply).groups() for reply in replies] == [
            (str(number + 1), turn[-1]) for number, turn in enumerate(turns[: len(replies)])
        ]
        inserted = bytes(made.tokens[row][made.inserted[row]].tolist()).decode()
        assert inserted == ''.join(replies)
        assert made.rewards[row] == 0.5 * made.turns[row]
        assert all(reply in made.texts[row] for reply in replies)
    assert (made.end - made.start <= NEW).all()
    # What an environment writes between two turns is no token of the answer's, in any number that is learnt from.
    other = dataclasses.replace(made, tokens=np.where(made.inserted, ord('#'), made.tokens))
    numbers = np.arange(len(made.end) * NEW, dtype=np.float32).reshape(-1, NEW) + 1
    for packing in (True, False):
        rows, others = (RolloutPacker(one, np.arange(len(one.end)), LENGTH, packing) for one in (made, other))
        fields, changed = rows.fields(), others.fields()
        assert (fields['tokens'] != changed['tokens']).sum() == made.inserted.sum()
        for name in fields.keys() - {'tokens'}:
            np.testing.assert_array_equal(fields[name], changed[name], err_msg=name)
        assert fields['loss_mask'].sum() == made.lengths.sum()
        np.testing.assert_allclose(fields['shares'].sum(), len(made.end), rtol=1e-6)
        back = rows.gather(rows.spread(numbers))
        own = np.arange(NEW) < made.lengths[:, None]
        np.testing.assert_array_equal(back, np.where(own, numbers, 0.0))


def test_the_samplers_log_probabilities_are_the_training_ones_in_exchanges(bundle, made):
    rows = RolloutPacker(made, np.arange(len(made.end)), LENGTH, True)
    with jax.set_mesh(one_device()):
        found, _ = per_token_logps(bundle.model, bundle.params, rows.fields(), 1.0)
    np.testing.assert_allclose(rows.gather(np.asarray(found)), made.logprobs, rtol=1e-4, atol=1e-4)


def test_an_exchange_is_its_own_whatever_slots_it_ran_in(bundle, made, opened):
    few = sampled(bundle, opened('ECHO'), slots=3)
    np.testing.assert_array_equal(few.tokens, made.tokens)
    np.testing.assert_array_equal(few.inserted, made.inserted)
    np.testing.assert_allclose(few.logprobs, made.logprobs, atol=1e-5)


def test_turns_and_room_have_limits(bundle, made, opened):
    short = sampled(bundle, opened('ECHO'), max_turns=1)
    assert not short.inserted.any()
    assert set(short.turns.tolist()) <= {0, 1}
    assert not short.ended[short.turns == 1].any()
    both = (made.turns > 0) & (short.turns == 1)
    first = short.lengths
    assert both.any()
    for row in np.flatnonzero(both):  # the first turn is the same
        low, high = short.start[row], short.start[row] + first[row]
        np.testing.assert_array_equal(short.tokens[row, low:high], made.tokens[row, low:high])


def test_the_automaton_finds_texts_across_tokens(bundle):
    tokenizer, stops = bundle.tokenizer, ('</calc>', 'lca', 'é')
    table = stop_texts.automaton(tokenizer, stops, 300)
    for text in ('a</calc>b', '<<//calc></cal</calc>', 'x</ca', 'alcala', 'caf', '</</</calc>'):
        ids, state, found = tokenizer(text).input_ids, 0, 0
        for place, token in enumerate(ids, 1):
            state = int(table[state, token])
            if state == len(table) - 1:
                found = place
                break
        assert found == stop_texts.reached(tokenizer, ids, stops), text
    cafe = tokenizer('café!').input_ids  # a character of two tokens: no token is it by itself
    assert stop_texts.reached(tokenizer, cafe, stops) == 5


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_a_reply_to_a_whole_turn_is_what_the_template_writes_there(bundle):
    tokenizer = bundle.tokenizer
    encode = ReplyEncoder(tokenizer, Template('own', TEMPLATE), 'tool', 259)
    asked, parts = [{'role': 'user', 'content': 'q'}], [Part('model', 'call', True)]
    ids = encode.turn(asked, parts, 'r1', tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == '\n<|tool|>r1<eos>\n<|assistant|>'
    assert tokenizer.eos_token_id in ids
    # The whole of it is what the template makes of the conversation.
    prompt = encode.template.render(specs_chat(asked), True)
    whole = encode.template.render(
        specs_chat([*asked, {'role': 'assistant', 'content': 'call'}, {'role': 'tool', 'content': 'r1'}]), True
    )
    assert prompt + 'call<eos>' + tokenizer.decode(ids) == whole
    no_tools = TEMPLATE.replace('{{ ', "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{{ ", 1)
    encode = dataclasses.replace(encode, template=Template('own', no_tools))
    assert tokenizer.decode(encode.turn(asked, parts, 'r1', tokenizer.eos_token_id)).startswith('\n<|user|>r1')
    encode = dataclasses.replace(encode, template=Template('own', no_tools.replace("'tool'", 'm.role')))
    with pytest.raises(ValueError, match='cannot be a turn'):
        encode.turn(asked, parts, 'r1', tokenizer.eos_token_id)
    with pytest.raises(ValueError, match='has none'):
        dataclasses.replace(encode, vocab_size=50).text('a')


def specs_chat(turns):
    from jaxtune.data.formats import Chat

    return Chat(tuple(turns))
