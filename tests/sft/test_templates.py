"""Chat templates that come from strangers: what they see, what they may use, and what they must not leave out."""

import pathlib
import re

import pytest
from test_chat_encoder import byte_level, runs

from jaxtune.data import formats
from jaxtune.data.chat_answers import AnswerReader
from jaxtune.data.chat_encoder import ChatEncoder, end_of_turn
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError

USER, ANSWER = {'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}
CHAT = Chat((USER, ANSWER))
CALL = {'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Paris'}}}
TOOL = {'type': 'function', 'function': {'name': 'weather', 'parameters': {'type': 'object', 'properties': {}}}}

# template -> what the one line says of it.
HOSTILE = {
    # more time than there is
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}': 'takes longer than',
    "{{ 'x'.replace('', 'y' * 30000).replace('y', 'z' * 30000) }}": 'MemoryError',
    # more memory, or more text
    "{{ 'a' * 10 ** 11 }}": 'MemoryError',
    "{{ 'x' | center(10 ** 11) }}": 'MemoryError',
    "{{ '%99999999999d' % 1 }}": 'MemoryError',
    "{{ ''.join(['x' * 1000000] * 100000) }}": 'MemoryError',
    "{% set x = namespace(a='x') %}{% for i in range(60) %}{% set x.a = x.a + x.a %}{% endfor %}": 'MemoryError',
    "{{ messages | tojson(indent='x' * 10 ** 6) }}": 'writes more than',
    '{{ lipsum(n=100000) }}': "'lipsum' is undefined",
    # what Jinja does not raise as its own error
    '{{ cycler() }}': 'RuntimeError',
    '{{ "x" | truncate(-1) }}': 'AssertionError',
    '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}': 'RecursionError',
    '{{ ' + '(' * 200 + '1' + ')' * 200 + ' }}': 'cannot be compiled: RecursionError',
    '{% for a in [1] %}' * 30 + '{% endfor %}' * 30: 'cannot be compiled: SyntaxError',
    "{% include '/etc/passwd' %}": 'TypeError',
    "{{ '\\ud800' }}": 'UnicodeEncodeError',
    # parts of the sandbox
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": 'reaches outside its sandbox',
    '{{ messages.append(1) }}': 'reaches outside its sandbox',
    # what says nothing of the answer
    '{{ 1 }}': 'does not write the answer of turn 2',
    '{% generation %}x{% endgeneration %}': 'does not write the answer of turn 2',
}


@pytest.mark.parametrize('source', HOSTILE)
def test_a_hostile_template_ends_in_one_line(source):
    with pytest.raises((UserError, FormatError), match=r'the given template') as caught:
        ChatEncoder(open_template(source, byte_level()), byte_level())(CHAT)
    assert HOSTILE[source] in str(caught.value)
    assert '\n' not in str(caught.value)
    # The next template is served all the same.
    assert ChatEncoder(open_template('chatml', byte_level()), byte_level())(CHAT)[0].assistant_mask.any()


@pytest.mark.parametrize('template', [5, True, {'default': 5}])
def test_a_template_that_is_no_text_is_refused(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"data\.template: the tokenizer's own template: expected a text"):
        open_template('auto', tokenizer)


READS = (
    "{% if tools is not none %}{{ 'TOOLS ' + (tools | tojson) }}{% endif %}"
    "{% if documents is none %}{{ '|' }}{% endif %}"
    "{% if bos_token is defined %}{{ 'BOS' }}{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TURNS = {
    'text': {'messages': [USER, ANSWER]},
    'tools': {'messages': [USER, ANSWER], 'tools': [TOOL]},
    'a call': {'messages': [USER, {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}], 'tools': [TOOL]},
    'reasoning_content': {'messages': [USER, ANSWER | {'reasoning_content': 'Hm'}]},
    'reasoning': {'messages': [USER, ANSWER | {'reasoning': 'Hm'}]},
    'thinking': {'messages': [USER, ANSWER | {'thinking': 'Hm'}]},
}


@pytest.mark.parametrize('name', TURNS)
def test_a_template_sees_what_transformers_shows_it(name):
    record, tokenizer = TURNS[name], byte_level('<|end|>')
    tokenizer.chat_template = READS
    theirs = tokenizer.apply_chat_template(record['messages'], tools=record.get('tools'), tokenize=False)
    chat = formats.chat('messages', 'here', record)
    (answer,) = next(AnswerReader(open_template('auto', tokenizer), tokenizer).answers([(chat, [1])]))
    ours = answer.prompt + answer.completion
    assert ours == theirs
    assert ours.endswith('<|end|>')


_TOOLS = "{% if tools is not none %}{{ 'TOOLS ' + (tools | tojson) }}{% endif %}"
_CALLS = "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
# what is left out -> (the answer, the part of the template that writes it, that part without it).
LEFT_OUT = {
    "the record's tools": ({'content': 'Hello'}, _TOOLS, '{% if tools %}{% endif %}'),
    'the name of tool call 1': ({'content': '', 'tool_calls': [CALL]}, _CALLS, ''),
    'the arguments of tool call 2': (
        {'content': '', 'tool_calls': [CALL, CALL]},
        '(call.function | tojson)',
        '(call.function | tojson if loop.first else call.function.name)',
    ),
    'the text beside tool calls of turn 2': (
        {'content': 'Hello', 'tool_calls': [CALL]},
        '{{ m.content }}',
        '{% if not m.tool_calls %}{{ m.content }}{% endif %}',
    ),
    'the reasoning of turn 2': ({'content': 'Hello', 'reasoning': 'Hm'}, 'm.reasoning_content', 'm.thoughts'),
}


@pytest.mark.parametrize('what', LEFT_OUT)
def test_a_template_that_leaves_something_out_is_refused_by_its_name(what):
    tokenizer = byte_level('<|end|>')
    answer, written, unwritten = LEFT_OUT[what]
    assert written in READS
    whole, without = (
        ChatEncoder(open_template(source, tokenizer), tokenizer)
        for source in (READS, READS.replace(written, unwritten))
    )
    turns = [USER, {'role': 'assistant'} | answer]
    chat = formats.chat('messages', 'here', {'messages': turns, 'tools': [TOOL]})
    assert whole(chat)[0].assistant_mask.any()
    with pytest.raises(FormatError, match=f'the given template does not write {what}'):
        without(chat)
    asked = formats.chat('messages', 'here', {'messages': [*turns, USER], 'tools': [TOOL]}, answered=False)
    assert whole.prompt(asked)[1]
    if 'reasoning' in what:  # of earlier turns many a template leaves it out on purpose
        without.prompt(asked)
    else:
        with pytest.raises(FormatError, match=f'does not write {what}'):
            without.prompt(asked)


def test_the_whole_answer_must_be_written():
    """Not its last letters alone, nor letters that the template has anyway."""
    shortens = READS.replace('m.content }}', "m.content.split('.')[0] }}")
    tokenizer = byte_level('<|end|>')
    for source, content in ((shortens, 'Yes. No'), (READS.replace('m.content', "''"), 'end')):
        with pytest.raises(UserError, match=f'does not write the answer of turn 2, {content!r}'):
            ChatEncoder(open_template(source, tokenizer), tokenizer)(Chat((USER, ANSWER | {'content': content})))
    ChatEncoder(open_template(shortens, tokenizer), tokenizer)(Chat((USER, ANSWER)))


# Phi-3's: an EOS after the last turn only.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No token ends a turn.
BARE = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize('answer', ['e', 'end', '<|end|>', 'a <|end|> b', '', ' ', '|', '\n', 'os>', '<eos>', 'Zq7v'])
def test_no_answer_is_taken_for_its_end(answer):
    tokenizer = byte_level('<|end|>', '<|user|>', '<|assistant|>', '<|im_end|>')
    turns = (USER, ANSWER | {'content': answer}, USER, ANSWER | {'content': answer})
    for source, end, between in (
        (PHI3, '<|end|>', '\n<|user|>\nHi<|end|>\n<|assistant|>\n'),
        ('chatml', '<|im_end|>', '\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'),
    ):
        template = open_template(source, tokenizer)
        head = between.lstrip('\n')
        expected = [(head, False), (answer + end, True), (between, False), (answer + end, True)]
        assert runs(tokenizer, ChatEncoder(template, tokenizer)(Chat(turns))) == expected
        assert tokenizer.convert_ids_to_tokens(end_of_turn(template, tokenizer)) == end
    # Where no token ends a turn, EOS does: no text goes on after it.
    for row in ChatEncoder(open_template(BARE, tokenizer), tokenizer)(Chat(turns)):
        assert runs(tokenizer, row)[-1] == (f'{answer}\n<eos>', True)


def test_calls_with_special_tokens_are_part_of_the_answer():
    tokenizer = byte_level('<|end|>', '<call>', '</call>')
    turns = (USER, ANSWER | {'tool_calls': [CALL]}, {'role': 'tool', 'content': '21'}, ANSWER)
    found = runs(tokenizer, ChatEncoder(open_template(READS, tokenizer), tokenizer)(Chat(turns)))
    call = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'
    assert [text for text, trained in found if trained] == [f'Hello{call}<|end|>', 'Hello<|end|>']


@pytest.mark.parametrize('inside', [True, False])
def test_marks_train_the_end_of_the_turn_wherever_it_stands(inside):
    end = "{{ '<|im_end|>' }}"
    body = f'{{% generation %}}{{{{ m.content }}}}{end if inside else ""}{{% endgeneration %}}{"" if inside else end}'
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + body
        + '{% else %}'
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_level('<|im_end|>')
    turns = Chat((USER, ANSWER, {'role': 'user', 'content': 'e'}, ANSWER | {'content': 'e'}))
    encode = ChatEncoder(open_template(source, tokenizer), tokenizer)
    assert [text for text, trained in runs(tokenizer, encode(turns)) if trained] == ['Hello<|im_end|>', 'e<|im_end|>']
    for only in (ChatEncoder(encode.template, tokenizer, 'last'), ChatEncoder(encode.template, tokenizer, skip=2)):
        assert [text for text, trained in runs(tokenizer, only(turns)) if trained] == ['e<|im_end|>']


def test_published_templates_train_what_their_marked_forms_do():
    """TRL keeps published templates beside copies that mark the answers; blanks and what opens a turn may differ."""
    trl = pytest.importorskip('trl')
    folder = pathlib.Path(trl.__file__).parent / 'chat_templates'
    turns = (USER, ANSWER | {'content': 'e'}, {'role': 'user', 'content': 'e'}, ANSWER | {'content': 'end'})
    pairs = [(path, path.with_name(f'{path.stem}_training.jinja')) for path in folder.glob('*.jinja')]
    names = ('cohere', 'gemma', 'gemma3', 'gptoss', 'llama3', 'lfm2', 'qwen2_5', 'qwen3_vl', 'qwen3_instruct_2507')
    pairs = [pair for pair in pairs if pair[1].is_file() and pair[0].stem in names]
    if not pairs:
        pytest.skip('this version of trl keeps no templates')
    for pair in pairs:
        texts = [path.read_text() for path in pair]
        marks = set(re.findall(r'<\|?[\w]+\|?>', ''.join(texts)))
        tokenizer = byte_level(*sorted(marks), bos='<bos>')
        readers = (AnswerReader(open_template(text, tokenizer), tokenizer) for text in texts)
        answers = (next(reader.answers([(Chat(turns), [3])]))[0] for reader in readers)
        trained, wanted = (''.join(one.completion[low:high] for low, high in one.spans) for one in answers)
        assert wanted.strip().endswith(trained.strip()), pair
        assert 'end' in trained, pair
