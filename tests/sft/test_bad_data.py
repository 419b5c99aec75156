"""Wrong instructions and preferences: one line with `file:line` and a count, or a note with a count."""

import json
import math

import pytest

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.records import open_records
from jaxtune.errors import UserError
from jaxtune.recipe import recipes
from jaxtune.tasks import specs

USER, ASSISTANT = {'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}
GOOD = {'messages': [USER, ASSISTANT]}
PAIR = {'prompt': 'Hi', 'chosen': 'Hello', 'rejected': 'Go'}


def rows(tmp_path, records, objective='sft', **changes):
    """The rows of a few records."""
    file = tmp_path / 'train.jsonl'
    file.write_text('\n'.join(map(json.dumps, records)) + '\n')
    config = recipes.defaults()
    keys = {'objective': objective, 'data.train': str(file), 'data.seq_len': 96}
    recipes.apply_overrides(config, keys | {name.replace('__', '.'): value for name, value in changes.items()})
    return specs.objective(config).dataset('train', tokenizers.load('bytes'), tmp_path / 'cache')


def turns(*roles):
    return {'messages': [{'role': role, 'content': 'x'} for role in roles]}


SFT = {
    'starts with the assistant': (
        [GOOD, turns('assistant', 'user', 'assistant'), turns('system', 'assistant')],
        r'train\.jsonl:2: the conversation starts with the assistant; expected the user \(2 of 3 records',
    ),
    'unknown role': (
        [GOOD, turns('user', 'robot')],
        r"train\.jsonl:2: unknown role 'robot'; expected one of system, user, assistant, tool, .*\(1 of 2 records",
    ),
    'no answer': ([turns('user')], r'train\.jsonl:1: the conversation has no turn of the assistant'),
    'no turns': ([{'messages': []}], r'train\.jsonl:1: the conversation has no turns'),
    'no text': (
        [GOOD, {'messages': [{'role': 'user'}]}],
        r"train\.jsonl:2: expected the field 'content'; found 'role'",
    ),
    'no output': (
        [{'instruction': 'a', 'output': 'b'}, {'instruction': 'a'}, {'instruction': 'a'}],
        r"train\.jsonl:2: expected the field 'output'; found 'instruction' \(2 of 3 records",
    ),
    'another format': (
        [GOOD, {'text': 'a document'}],
        r"train\.jsonl:2: data\.format=auto: expected the fields of alpaca .* found 'text' \(1 of 2 records",
    ),
    'prompt fills the row': (
        [{'prompt': 'long ' * 50, 'completion': 'never seen'}] * 2,
        r'train\.jsonl:1: data\.seq_len=96: the prompt alone fills the row, here and in all 2 records',
    ),
}


HALF = chr(0xD83D)  # of an emoji


def call(**fields):
    return {'messages': [USER, ASSISTANT | {'tool_calls': [{'function': {'name': 'f', 'arguments': {}} | fields}]}]}


SFT |= {
    'half an emoji in a text': (
        [GOOD, turns('user') | {'messages': [USER | {'content': HALF}]}],
        r"Unicode text in 'co",
    ),
    'in an earlier exchange': (
        [{'instruction': 'a', 'output': 'b', 'history': [[f'a {HALF}', 'b']]}],
        r"train\.jsonl:1: expected Unicode text in 'history'; found half a surrogate pair, .ud83d",
    ),
    'in a call': ([call(arguments={'x': [HALF]})], r"train\.jsonl:1: expected Unicode text in 'tool_calls'"),
    "in a call's names": ([call(arguments={HALF: 1})], r"train\.jsonl:1: expected Unicode text in 'tool_calls'"),
    'in the tools': ([GOOD | {'tools': [{'name': HALF}]}], r"train\.jsonl:1: expected Unicode text in 'tools'"),
    'calls that are a text': (
        [{'messages': [USER, ASSISTANT | {'tool_calls': '[]'}]}],
        r"train\.jsonl:1: expected a list of calls in 'tool_calls'",
    ),
    'a call without a name': (
        [call(name=None)],
        r"expected a list of calls in 'tool_calls', each with a function's name",
    ),
    'a weight of a turn': (
        [GOOD, {'messages': [USER, ASSISTANT | {'weight': -1}]}],
        r"train\.jsonl:2: expected a number of at least 0 in 'weight' of a turn; found -1 \(1 of 2 records",
    ),
    'a turn not to train': (
        [{'messages': [USER, ASSISTANT | {'train': False}]}],
        r'train\.jsonl:1: no turn of the assistant is trained, here and in all 1 records',
    ),
    'a call of old': (
        [{'messages': [USER, ASSISTANT | {'function_call': {'name': 'f'}}]}],
        r"field 'function_call' of",
    ),
    'a weight of a record': (
        [GOOD | {'weight': float('nan')}],
        r"train\.jsonl:1: expected a number of at least 0 in 'weight' of the record",
    ),
    'arguments of a template': (
        [GOOD | {'chat_template_kwargs': {'tools': 1}}],
        r"'chat_template_kwargs' names 'tools', which the record itself holds",
    ),
    'two system prompts': (
        [turns('system', 'user', 'assistant') | {'system': 'other'}],
        r"train\.jsonl:1: expected one system prompt; found 'other' in 'system' and another in the first turn",
    ),
    'tools that are a number': (
        [GOOD | {'tools': 5}],
        r"train\.jsonl:1: expected a list of tools, or a text, in 'tools'",
    ),
}


def test_values_nested_too_deep_and_numbers_too_long_are_named(tmp_path):
    deep: list = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(UserError, match=r"train\.jsonl:1: expected values nested at most 100 deep in 'tools'"):
        rows(tmp_path, [GOOD | {'tools': deep}])
    (tmp_path / 'long.jsonl').write_text('{"a": ' + '9' * 5000 + '}\n')
    with pytest.raises(
        UserError, match=r'long\.jsonl:1: expected one JSON object in UTF-8 on the line: Exceeds the limit'
    ):
        list(open_records(str(tmp_path / 'long.jsonl')))
    (tmp_path / 'long.json').write_text('[' + '9' * 5000 + ']')
    with pytest.raises(UserError, match=r'long\.json: expected JSON in UTF-8: Exceeds the limit'):
        list(open_records(str(tmp_path / 'long.json')))


def test_fields_that_change_nothing_pass_and_a_records_system_prompt_is_read(tmp_path):
    plain = rows(tmp_path, [GOOD | {'messages': [{'role': 'system', 'content': 'Be kind.'}, USER, ASSISTANT]}])
    fields = {'weight': 1, 'chat_template_kwargs': {}, 'functions': [], 'tools': '[]', 'system': 'Be kind.'}
    found = rows(tmp_path, [{'messages': [USER, ASSISTANT | {'weight': 1.0, 'train': True}]} | fields])
    named = rows(tmp_path, [{'question': 'Hi', 'answer': 'Hello', 'system': 'Be kind.'}], data__template='chatml')
    for other in (found, named):
        assert other[0]['tokens'].tolist() == plain[0]['tokens'].tolist()


def test_arrow_fills_in_nothing(tmp_path):
    """A table gives each record the fields of all; those that a record did not have stay away."""
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    records = [call(arguments={'city': 'Paris'}), call(arguments={'numbers': [1, 2], 'more': {'a': 1}}), GOOD]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'a.parquet')
    for (_, found), record in zip(open_records(str(tmp_path / 'a.parquet')), records, strict=True):
        assert found == record


@pytest.mark.parametrize('case', SFT)
def test_conversations_that_are_none(tmp_path, case):
    records, message = SFT[case]
    with pytest.raises(UserError, match=message):
        rows(tmp_path, records)


@pytest.mark.parametrize(
    ('template', 'message'),
    [
        (
            '{% for m in messages %}{{ "<" + m.role + ">" + m.content + eos_token }}{% endfor %}',
            r'train\.jsonl:1: data\.template: the given template has no generation prompt',
        ),
        ('{{ messages.__class__.__base__.__subclasses__() }}', r'template reaches outside its sandbox'),
        ('{{ raise_exception("no system, please") }}', r'train\.jsonl:1: .* no system, please \(1 of 1 records'),
        ('{{ 1 / 0 }}', r'train\.jsonl:1: .* template fails: ZeroDivisionError'),
        ('{% for i in range(999999999) %}a{% endfor %}', r'train\.jsonl:1: .* template fails: OverflowError'),
    ],
)
def test_templates_that_cannot_be_trained_with(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        rows(tmp_path, [GOOD], data__template=template)


def test_answers_cut_at_the_end_of_a_row_are_counted(tmp_path, capsys):
    records = [
        {'prompt': 'Say it: ', 'completion': 'short'},
        {'prompt': 'Say it: ', 'completion': 'long ' * 50},
        {'prompt': 'long ' * 50, 'completion': 'never seen'},
    ]
    found = rows(tmp_path, records, data__packing=False)
    assert len(found) == 2
    assert all(found[i]['loss_mask'].sum() > 0 for i in range(2))
    shown = ' '.join(capsys.readouterr().out.split())
    assert 'format prompt (3), template plain' in shown
    assert '1 of 3 are longer than data.seq_len=96 and cut, first' in shown
    assert 'train.jsonl:2' in shown
    assert '1 of 3 are left out: their prompt alone fills data.seq_len=96' in shown
    # A cut answer does not end there.
    assert found[1]['tokens'][-1] != tokenizers.load('bytes').eos_token_id


PAIRS = {
    'missing chosen': (
        [PAIR, {'prompt': 'Hi', 'rejected': 'Go'}],
        r"train\.jsonl:2: expected the field 'chosen'; found 'prompt', 'rejected' \(1 of 2 records",
    ),
    'missing rejected': ([{'chosen': 'a'}], r"train\.jsonl:1: expected the field 'rejected'"),
    'all the same': (
        [PAIR | {'rejected': 'Hello'}] * 2,
        r'train\.jsonl:1: chosen and rejected are the same, here and in all 2 records',
    ),
    'unpaired': (
        [{'prompt': 'Hi', 'completion': 'Hello', 'label': True}],
        r"train\.jsonl:1: expected the fields 'chosen' and 'rejected'; .* only dpo\.loss=kto",
    ),
    'alike once cut': (
        [{'prompt': 'Hi', 'chosen': 'a' * 200 + 'b', 'rejected': 'a' * 200 + 'c'}],
        r'train\.jsonl:1: data\.seq_len=96 leaves no pair whose answers differ',
    ),
    'a question last': (
        [{'chosen': [USER, ASSISTANT, USER], 'rejected': [USER, ASSISTANT]}],
        r"train\.jsonl:1: expected 'chosen' and 'rejected' to end with the assistant; found the user",
    ),
}


PAIRS |= {
    'a margin of nothing': (
        [PAIR, PAIR | {'margin': math.nan}],
        r"train\.jsonl:2: expected a finite number in 'margin'",
    ),
    'a margin without end': ([PAIR | {'margin': -math.inf}], r"train\.jsonl:1: expected a finite number in 'margin'"),
    'a margin beyond floats': ([PAIR | {'margin': 10**400}], r"train\.jsonl:1: expected a finite number in 'margin'"),
    'a label of old': (
        [{'prompt': 'Hi', 'completion': 'Hello', 'label': -1}],
        r"train\.jsonl:1: expected true, false, 1 or 0 in 'label'; found -1",
    ),
    'a weight': (
        [PAIR | {'weight': 'x'}],
        r"train\.jsonl:1: expected a number of at least 0 in 'weight' of the record",
    ),
    'half an emoji': ([PAIR | {'chosen': [{'role': 'assistant', 'content': 'a', 'name': HALF}]}], r"text in 'name'"),
}


@pytest.mark.parametrize('case', PAIRS)
def test_pairs_that_are_none(tmp_path, case):
    records, message = PAIRS[case]
    with pytest.raises(UserError, match=message):
        rows(tmp_path, records, 'reward')


def test_equal_pairs_are_left_out_and_counted(tmp_path, capsys):
    found = rows(tmp_path, [PAIR, PAIR | {'rejected': 'Hello'}, PAIR | {'chosen': 'No'}], 'reward')
    assert len(found) == 2
    shown = ' '.join(capsys.readouterr().out.split())
    assert '1 pairs are left out: chosen and rejected are the same, first' in shown
    assert 'train.jsonl:2' in shown
    assert found.baselines == {'longer_is_better': 0.75}  # longer once, as long once


def test_dialogues_in_one_text_and_turns_give_the_same_pairs(tmp_path):
    text = '\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:'
    prompt = [USER, {'role': 'assistant', 'content': 'Yes?'}, {'role': 'user', 'content': 'Bye'}]
    forms = [
        {'chosen': f'{text} See you', 'rejected': f'{text} No'},
        {'prompt': prompt, 'chosen': 'See you', 'rejected': 'No'},
        {
            'conversations': [
                {'from': 'human', 'value': 'Hi'},
                {'from': 'gpt', 'value': 'Yes?'},
                {'from': 'human', 'value': 'Bye'},
            ],
            'chosen': {'from': 'gpt', 'value': 'See you'},
            'rejected': {'from': 'gpt', 'value': 'No'},
        },
        {
            'chosen': [*prompt, {'role': 'assistant', 'content': 'See you'}],
            'rejected': [*prompt, {'role': 'assistant', 'content': 'No'}],
        },
    ]
    found = rows(tmp_path, forms, 'reward', data__seq_len=256)
    assert len(found) == 4
    first = {name: value.tolist() for name, value in found[0].items()}
    for number in range(1, 4):
        assert {name: value.tolist() for name, value in found[number].items()} == first
    tokenizer = tokenizers.load('bytes')
    answer = found[0]['chosen'][first['chosen_start'] : first['chosen_end']]
    assert tokenizer.decode(answer) == 'See you<eos>'


def test_unpaired_answers_and_mismatched_ones_for_kto(tmp_path):
    records = [
        {'prompt': 'Hi', 'completion': 'Hello', 'label': True},
        {'messages': [USER, {'role': 'assistant', 'content': 'Go'}], 'label': False},
        PAIR,
    ]
    found = rows(tmp_path, records, 'dpo', dpo__loss='kto', data__template='plain')
    assert [
        (float(row['chosen_weight']), float(row['rejected_weight'])) for row in map(found.__getitem__, range(3))
    ] == [
        (1, 0),
        (0, 1),
        (1, 1),
    ]
    row = found[0]  # its prompt with the next one's answer
    assert tokenizers.load('bytes').decode(row['mismatched'][: row['mismatched_end']]) == 'HiGo<eos>'
    assert row['mismatched_start'] == row['chosen_start'] == 2


def test_a_system_prompt_and_demonstrations_come_first_and_are_never_trained(tmp_path):
    shown = tmp_path / 'shown.jsonl'
    shown.write_text(json.dumps({'instruction': 'Again', 'output': 'And again'}) + '\n')
    found = rows(tmp_path, [GOOD], sft__system='Be brief.', sft__demonstrations=str(shown), data__seq_len=256)
    one, tokenizer = found.examples[0], tokenizers.load('bytes')
    text = tokenizer.decode(one.ids)
    assert text.index('Be brief.') < text.index('And again') < text.index('Hi<eos>')
    assert tokenizer.decode(one.ids[one.assistant_mask > 0]) == 'Hello<eos>'


def test_instructions_of_the_interpreters_library(tmp_path):
    config = recipes.defaults()
    recipes.apply_overrides(
        config, {'objective': 'reward', 'data.train': 'python-stdlib', 'data.eval': 'python-stdlib'}
    )
    from jaxtune.data.stdlib_instructions import open_instructions

    held_out = list(open_instructions('data.eval', pairs=True))
    assert len(held_out) > 100
    for _, pair in held_out[:50]:
        assert pair['chosen'] != pair['rejected']
        assert sorted(pair['chosen'].replace('.', ' ').split()) == sorted(pair['rejected'].replace('.', ' ').split())
    train = list(open_instructions('data.train', pairs=False))
    assert not {place.rsplit(':')[0] for place, _ in train} & {place.rsplit(':')[0] for place, _ in held_out}
    assert all(set(record) == {'instruction', 'input', 'output'} for _, record in train[:50])


def test_stages_may_be_called_as_their_objectives(tmp_path):
    from jaxtune.recipe import flags

    recipe = tmp_path / 'recipe.py'
    recipe.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n'
        "    return ConfigDict({'stages': ('sft', 'reward'), 'sft': {'train': {'steps': 3}}, 'reward': {'seed': 1}})\n"
    )
    words = ['--config.sft.train.steps=5', '--config.sft.system=Be kind.', '--config.reward.reward.center=0.5']
    configs = flags.parse(['jaxtune', '--config', str(recipe), *words]).configs
    assert list(configs) == ['sft', 'reward']
    assert configs['sft'].train.steps == 5
    assert configs['reward'].train.steps == 0
    assert configs['sft'].sft.system == configs['reward'].sft.system == 'Be kind.'
    assert (configs['sft'].reward.center, configs['reward'].reward.center) == (0.0, 0.5)
