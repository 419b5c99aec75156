"""Exchanges whose turns are written here: calls of tools in conversations are answered as the template shows it."""

import json
import types

import numpy as np
import pytest

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.formats import Chat
from jaxtune.data.templates import Template
from jaxtune.errors import StepError
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import Completions
from jaxtune.recipe import recipes
from jaxtune.rl import exchanges
from jaxtune.rl.environments import RunningEnvironment
from jaxtune.rl.replies import ReplyEncoder
from jaxtune.tasks import rewarded

# As ChatML templates of published models write calls and their results: those of one tool after the other share a turn.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|user|>' }}"
    "{% endif %}{{ '<tool_response>' + m.content + '</tool_response>' }}{% if loop.last or "
    "messages[loop.index0 + 1].role != 'tool' %}{{ '<eos>\n' }}{% endif %}{% else %}"
    "{{ '<|' + m.role + '|>' + m.content + '<eos>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LIMIT, TOKENIZER = 400, tokenizers.load('bytes')
EOS = TOKENIZER.eos_token_id
CHAT = [{'role': 'user', 'content': '12 + 34?'}]


def call(expression):
    arguments = json.dumps({'name': 'calculator', 'arguments': {'expression': expression}})
    return f'let me see\n<tool_call>\n{arguments}\n</tool_call>'


@pytest.fixture(scope='module')
def environment():
    config = recipes.defaults()
    recipes.apply_overrides(config, {'rl.environment': 'calculator'})
    return RunningEnvironment(config.rl)


def held(environment, prompts, scripts, limit=LIMIT, template=TEMPLATE, max_turns=8):
    """Exchanges about prompts in which the policy writes the given turns, one after the other."""
    encode = ReplyEncoder(TOKENIZER, Template('own', template), environment.role, 259)
    hold = exchanges.Exchanges(environment, encode, TOKENIZER, (EOS,), limit, max_turns)
    left = {id(prompt): list(script) for prompt, script in zip(prompts, scripts, strict=True)}

    def sample(live, rounds):
        rows = [TOKENIZER(left[id(one.prompt)].pop(0)).input_ids[: limit - len(one.ids)] for _, one in live]
        tokens = np.zeros((len(rows), limit), np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        logprobs = np.where(tokens > 0, -tokens / 1000, 0).astype(np.float32)
        return Completions(tokens, np.asarray([len(ids) for ids in rows]), logprobs)

    found = hold(prompts, sample)
    assert all(one.open is False for one in found)
    return found


def prompt_of(chat):
    return Prompt(chat, TOKENIZER(Template('own', TEMPLATE).render(Chat(tuple(chat)), True)).input_ids)


def test_a_call_is_answered_as_the_template_shows_the_conversation(environment):
    turns = [call('12 + 34'), call('46 * 2'), 'it is 92']
    prompt = prompt_of(CHAT)
    (one,) = held(environment, [prompt], [[f'{turn}<eos>' for turn in turns]])
    whole = [*CHAT]
    for turn, reply in zip(turns, ['46', '92', None], strict=True):
        whole.append({'role': 'assistant', 'content': turn})
        whole += [{'role': 'tool', 'content': reply}] if reply else []
    shown = Template('own', TEMPLATE).render(Chat(tuple(whole)))
    assert TOKENIZER.decode(one.whole) == shown.rstrip('\n')
    own = np.asarray(one.own)
    assert TOKENIZER.decode(np.asarray(one.ids)[own]) == ''.join(f'{turn}<eos>' for turn in turns)
    assert one.logprobs == pytest.approx((-np.asarray(one.ids) / 1000)[own].tolist())
    assert (one.turns, one.ended, one.reward) == (3, True, 0.0)
    assert [(part.who, part.text) for part in one.parts] == [
        ('model', turns[0]), ('environment', '46'), ('model', turns[1]), ('environment', '92'), ('model', turns[2]),
    ]  # fmt: skip


def test_a_tag_is_answered_within_the_turn_and_what_was_drawn_after_it_is_none_of_it(environment):
    script = ['so <calc>12+34</calc> = 47, I think<eos>', ' and <calc>46/5</calc>', '.<eos>']
    for prompt in (prompt_of(CHAT), Prompt('12 + 34? ', TOKENIZER('12 + 34? ').input_ids)):
        (one,) = held(environment, [prompt], [script])
        expected = 'so <calc>12+34</calc> = 46 and <calc>46/5</calc> = 9.2.<eos>'
        assert TOKENIZER.decode(one.ids) == expected
        inserted = np.asarray(one.ids)[~np.asarray(one.own)]
        assert TOKENIZER.decode(inserted) == ' = 46 = 9.2'
        assert len(one.logprobs) == sum(one.own)
    # A call after a tag's reply: both stand in the past of the conversation as they were written.
    (one,) = held(environment, [prompt_of(CHAT)], [[script[0], f' so {call("1+1")}<eos>', 'ok<eos>']])
    past = {'role': 'assistant', 'content': f'so <calc>12+34</calc> = 46 so {call("1+1")}'}
    rest = ({'role': 'tool', 'content': '2'}, {'role': 'assistant', 'content': 'ok'})
    assert TOKENIZER.decode(one.whole) == Template('own', TEMPLATE).render(Chat((*CHAT, past, *rest))).rstrip('\n')


def test_exchanges_end_each_in_its_own_time(environment):
    prompts = [prompt_of([{'role': 'user', 'content': text}]) for text in ('a', 'b', 'c')]
    scripts = [['no<eos>'], ['<calc>1+1</calc>', '<calc>2+2</calc>', 'x' * 500], ['<calc>3*3</calc>'] * 9]
    first, second, third = held(environment, prompts, scripts, max_turns=4)
    assert (first.turns, first.ended) == (1, True)
    assert (second.turns, second.ended, len(second.ids)) == (2, False, LIMIT)  # cut
    assert (third.turns, third.ended) == (4, False)  # as many turns as there may be, and no reply to the last
    assert TOKENIZER.decode(third.ids) == '<calc>3*3</calc> = 9' * 3 + '<calc>3*3</calc>'
    arrays = exchanges.arrays([first, second, third], 500, LIMIT, 7)
    assert arrays['tokens'].shape == arrays['inserted'].shape == (3, 500)
    assert arrays['turns'].tolist() == [1, 2, 4]
    for row, one in enumerate((first, second, third)):
        assert arrays['tokens'][row, : arrays['end'][row]].tolist() == one.whole
        assert arrays['inserted'][row].sum() == len(one.own) - sum(one.own)


@pytest.mark.parametrize('room', range(16, 24))
def test_a_reply_that_leaves_no_room_is_not_added(environment, room):
    prompt = Prompt('?', [63])
    (one,) = held(environment, [prompt], [['<calc>1+1</calc>', 'x' * 40]], limit=room)
    assert len(one.ids) <= room
    replied = room > len('<calc>1+1</calc> = 2')
    assert one.own.count(False) == (len(' = 2') if replied else 0)
    assert not one.ended


def test_a_template_that_refuses_every_reply_is_said(environment):
    refuses = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + TEMPLATE
    with pytest.raises(StepError, match=r"rl.environment=calculator: the reply '2' cannot be a turn: .*one question"):
        held(environment, [prompt_of(CHAT)], [[f'{call("1+1")}<eos>', 'x<eos>']], template=refuses)


@pytest.mark.parametrize(
    ('template', 'keys', 'given'),
    [
        ('{% for tool in tools %}{{ tool }}{% endfor %}', {}, True),
        ('{% for m in messages %}{{ m.content }}{% endfor %}', {}, False),
        (None, {}, False),
        ('{{ tools }}', {'data.template': 'chatml'}, False),
        ('{{ tools }}', {'data.template_args.tools': ['own']}, False),
    ],
)
def test_a_template_that_takes_tools_is_given_the_environments(environment, template, keys, given):
    config = recipes.defaults()
    recipes.apply_overrides(config, keys)
    bundle = types.SimpleNamespace(tokenizer=types.SimpleNamespace(chat_template=template))
    args = rewarded.template_args(config, bundle, environment)
    if given:
        assert [tool['function']['name'] for tool in args['tools']] == ['calculator']
    else:
        assert args == config.data.template_args.to_dict()
    assert rewarded.template_args(config, bundle, None) == config.data.template_args.to_dict()
