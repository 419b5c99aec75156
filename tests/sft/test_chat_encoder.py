"""Which tokens are trained, by hand-checked tables: each answer with its end of turn, never a prompt."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.data import formats
from jaxtune.data import tokenizer as ours
from jaxtune.data.chat_encoder import ChatEncoder, end_of_turn
from jaxtune.data.formats import Chat
from jaxtune.data.templates import NAMED, open_template
from jaxtune.errors import UserError

MERGED = ('Ġyes', 'Ġno', '.Ġ')


def byte_level(*added: str, eos: str = '<eos>', pad: str = '<pad>', bos: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes, a few merges across spaces, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {letter: i for i, letter in enumerate(alphabet)}, []
    for word in MERGED:
        so_far = word[0]
        for letter in word[1:]:
            merges.append((so_far, letter))
            so_far += letter
            vocab.setdefault(so_far, len(vocab))
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([token for token in dict.fromkeys((pad, eos, bos, *added)) if token])
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing(f'{bos} $A', special_tokens=[(bos, made.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, eos_token=eos, bos_token=bos)


def spaced() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: every text begins with a space of the tokenizer's own."""
    letters = '▁abcdefghijklmnopqrstuvwxyz:?+ABCDEFGHIJKLMNOPQRSTUVWXYZ\n'
    vocab = {'<unk>': 0, '<s>': 1, '</s>': 2} | {letter: i + 3 for i, letter in enumerate(letters)}
    vocab |= {'▁y': len(vocab)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[('▁', 'y')], unk_token='<unk>'))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse()])
    made.add_special_tokens(['<s>', '</s>'])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token='</s>', unk_token='<unk>', pad_token='</s>')


def runs(tokenizer, encoded) -> list[tuple[str, bool]]:
    """Runs of tokens that are trained or not, as text."""
    if isinstance(encoded, list):
        (encoded,) = encoded  # in one row
    found: list[tuple[list[int], bool]] = []
    for token, trained in zip(encoded.ids.tolist(), (encoded.assistant_mask > 0).tolist(), strict=True):
        if not found or found[-1][1] != trained:
            found.append(([], trained))
        found[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in found]


SYSTEM = {'role': 'system', 'content': 'Be kind.'}
TWO = ({'role': 'user', 'content': '2+2? 你'}, {'role': 'assistant', 'content': ' yes 你好'})
FOUR = (SYSTEM, *TWO, {'role': 'user', 'content': 'Hm'}, {'role': 'assistant', 'content': '4'})
VICUNA = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
BELOW = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'

# template -> runs of (prompt, answer, prompt, answer) of FOUR, and of TWO; E ends a turn, B begins a text.
TABLE = {
    'chatml': (
        (
            '<|im_start|>system\nBe kind.E\n<|im_start|>user\n2+2? 你E\n<|im_start|>assistant\n',
            ' yes 你好E',
            '\n<|im_start|>user\nHmE\n<|im_start|>assistant\n',
            '4E',
        ),
        ('<|im_start|>user\n2+2? 你E\n<|im_start|>assistant\n', ' yes 你好E'),
    ),
    'llama3': (
        (
            'B<|start_header_id|>system<|end_header_id|>\n\nBe kind.E<|start_header_id|>user<|end_header_id|>\n\n'
            '2+2? 你E<|start_header_id|>assistant<|end_header_id|>\n\n',
            'yes 你好E',
            '<|start_header_id|>user<|end_header_id|>\n\nHmE<|start_header_id|>assistant<|end_header_id|>\n\n',
            '4E',
        ),
        (
            'B<|start_header_id|>user<|end_header_id|>\n\n2+2? 你E<|start_header_id|>assistant<|end_header_id|>\n\n',
            'yes 你好E',
        ),
    ),
    'llama2': (
        ('B[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n2+2? 你 [/INST]', ' yes 你好 E', 'B[INST] Hm [/INST]', ' 4 E'),
        ('B[INST] 2+2? 你 [/INST]', ' yes 你好 E'),
    ),
    'mistral': (
        ('B[INST] Be kind.\n\n2+2? 你 [/INST]', ' yes 你好E', '[INST] Hm [/INST]', ' 4E'),
        ('B[INST] 2+2? 你 [/INST]', ' yes 你好E'),
    ),
    'gemma': (
        (
            'B<start_of_turn>user\nBe kind.\n\n2+2? 你E\n<start_of_turn>model\n',
            'yes 你好E',
            '\n<start_of_turn>user\nHmE\n<start_of_turn>model\n',
            '4E',
        ),
        ('B<start_of_turn>user\n2+2? 你E\n<start_of_turn>model\n', 'yes 你好E'),
    ),
    'phi3': (
        (
            'B<|system|>\nBe kind.E\n<|user|>\n2+2? 你E\n<|assistant|>\n',
            'yes 你好E',
            '\n<|user|>\nHmE\n<|assistant|>\n',
            '4E',
        ),
        ('B<|user|>\n2+2? 你E\n<|assistant|>\n', 'yes 你好E'),
    ),
    'zephyr': (
        (
            '<|system|>\nBe kind.E\n<|user|>\n2+2? 你E\n<|assistant|>\n',
            'yes 你好E',
            '\n<|user|>\nHmE\n<|assistant|>\n',
            '4E',
        ),
        ('<|user|>\n2+2? 你E\n<|assistant|>\n', 'yes 你好E'),
    ),
    'vicuna': (
        ('BBe kind. USER: 2+2? 你 ASSISTANT:', ' yes 你好E', 'USER: Hm ASSISTANT:', ' 4E'),
        (f'B{VICUNA}USER: 2+2? 你 ASSISTANT:', ' yes 你好E'),
    ),
    'alpaca': (
        (
            'BBe kind.\n\n### Instruction:\n2+2? 你\n\n### Response:\n',
            ' yes 你好E',
            '\n\n### Instruction:\nHm\n\n### Response:\n',
            '4E',
        ),
        (f'B{BELOW}### Instruction:\n2+2? 你\n\n### Response:\n', ' yes 你好E'),
    ),
    'plain': (('BBe kind.2+2? 你', ' yes 你好E', 'Hm', '4E'), ('B2+2? 你', ' yes 你好E')),
}


def test_the_table_has_every_template():
    assert set(TABLE) == set(NAMED)


@pytest.mark.parametrize('own_end', [True, False], ids=['its own end of turn', 'pad = eos'])
@pytest.mark.parametrize('name', TABLE)
def test_answers_and_their_ends_are_trained_and_nothing_else(name, own_end):
    end = NAMED[name][0] if own_end else ''
    tokenizer = byte_level(*filter(None, [end]), bos='<bos>') if own_end else byte_level(pad='<eos>')
    if not own_end:
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end, begin = end or '<eos>', '<bos>' if own_end else ''
    template = open_template(name, tokenizer)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(template, tokenizer)) == end
    for turns, expected in zip((FOUR, TWO), TABLE[name], strict=True):
        texts = [_fill(text, begin, end) for text in expected]
        wanted = [(text, bool(i % 2)) for i, text in enumerate(texts)]
        assert runs(tokenizer, ChatEncoder(template, tokenizer)(Chat(turns))) == wanted
        last = [(''.join(text for text, _ in wanted[:-1]), False), wanted[-1]]
        assert runs(tokenizer, ChatEncoder(template, tokenizer, 'last')(Chat(turns))) == last


def _fill(text: str, begin: str, end: str) -> str:
    text = begin + text[1:] if text.startswith('B') and not text.startswith('Be') else text
    for word in ('E\n', 'E<', 'E'):
        if word == 'E' and not text.endswith('E'):
            continue
        text = text[:-1] + end if word == 'E' else text.replace(word, end + word[1:])
    return text


FORMATS = {
    'alpaca': {'instruction': 'Add', 'input': '2 2', 'output': 'no'},
    'alpaca, empty input': {'instruction': 'Add', 'input': '', 'output': 'no'},
    'sharegpt': {'conversations': [{'from': 'human', 'value': 'Add'}, {'from': 'gpt', 'value': 'no'}]},
    'messages': {'messages': [{'role': 'user', 'content': 'Add'}, {'role': 'assistant', 'content': 'no'}]},
    'prompt': {'prompt': 'Add', 'completion': 'no'},
    'prompt of turns': {
        'prompt': [{'role': 'user', 'content': 'Add'}],
        'completion': [{'role': 'assistant', 'content': 'no'}],
    },
}


@pytest.mark.parametrize('case', FORMATS)
def test_every_format_gives_the_same_masks(case):
    tokenizer, record = byte_level('<|im_end|>'), FORMATS[case]
    name = case.split(',')[0].split(' of')[0]
    assert formats.detect(record) == name
    chat = formats.chat(name, 'data.jsonl:1', record)
    asked = 'Add\n\n2 2' if record.get('input') else 'Add'
    assert runs(tokenizer, ChatEncoder(open_template('chatml', tokenizer), tokenizer)(chat)) == [
        (f'<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n', False),
        ('no<|im_end|>', True),
    ]
    alpaca = runs(tokenizer, ChatEncoder(open_template('alpaca', tokenizer), tokenizer)(chat))
    head = BELOW.replace('task. Write', 'task, paired with an input that provides further context. Write')
    shown = '### Instruction:\nAdd\n\n### Input:\n2 2\n\n' if record.get('input') else '### Instruction:\nAdd\n\n'
    head = head if record.get('input') else BELOW
    assert alpaca == [(f'{head}{shown}### Response:\n', False), ('no<eos>', True)]


@pytest.mark.parametrize(
    ('prompt', 'completion', 'ids'),
    [
        ('Answer: ', 'yes', ['A', 'n', 's', 'w', 'e', 'r', ':', 'Ġ', '*y', '*e', '*s', '*<eos>']),
        ('Answer:', ' yes', ['A', 'n', 's', 'w', 'e', 'r', ':', '*Ġyes', '*<eos>']),
        ('No.', ' no', ['N', 'o', '.', '*Ġno', '*<eos>']),
        ('', 'no', ['*n', '*o', '*<eos>']),
    ],
)
def test_tokens_never_lie_across_the_border(prompt, completion, ids):
    tokenizer = byte_level(pad='<eos>')
    chat = formats.chat('prompt', 'here', {'prompt': prompt, 'completion': completion})
    template = open_template('auto', tokenizer, raw=chat.raw)
    (found,) = ChatEncoder(template, tokenizer)(chat)
    names = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    assert [('*' if trained else '') + name for name, trained in zip(names, found.assistant_mask, strict=True)] == ids
    # What the model reads before it answers is what it will be given.
    assert found.ids[found.assistant_mask == 0].tolist() == tokenizer(prompt).input_ids


def test_a_tokenizer_that_begins_texts_with_a_space_keeps_its_ids():
    tokenizer = spaced()
    chat = formats.chat('prompt', 'here', {'prompt': 'Answer: ', 'completion': 'yes'})
    (found,) = ChatEncoder(open_template('plain', tokenizer), tokenizer)(chat)
    names = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    assert ''.join(names) == '▁Answer:▁yes</s>'
    assert [name for name, trained in zip(names, found.assistant_mask, strict=True) if trained] == [
        'y',
        'e',
        's',
        '</s>',
    ]


REWRITES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content }}{% elif loop.last %}{{ '<a>(thinks) ' "
    "+ m.content + eos_token }}{% else %}{{ '<a>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
MARKED = REWRITES.replace("{{ '<a>(thinks) '", "{{ '<a>' }}{% generation %}{{ '(thinks) '").replace(
    "+ m.content + eos_token }}{% else %}{{ '<a>' + m.content + eos_token }}",
    "+ m.content + eos_token }}{% endgeneration %}{% else %}{{ '<a>' }}{% generation %}{{ m.content + eos_token }}"
    '{% endgeneration %}',
)


@pytest.mark.parametrize('source', [REWRITES, MARKED], ids=['not marked', 'marked'])
def test_where_a_template_rewrites_its_past_each_answer_is_a_row_of_its_own(source):
    tokenizer, chat = byte_level(), Chat(FOUR[1:])
    template = open_template(source, tokenizer)
    assert template.marks == (source == MARKED)
    first, second = ChatEncoder(template, tokenizer)(chat)
    assert runs(tokenizer, first) == [('<u>2+2? 你<a>', False), ('(thinks)  yes 你好<eos>', True)]
    # What the second answer is asked after holds the first as the template shows it then.
    assert runs(tokenizer, second) == [
        ('<u>2+2? 你<a> yes 你好<eos><u>Hm<a>', False),
        ('(thinks) 4<eos>', True),
    ]
    assert runs(tokenizer, ChatEncoder(template, tokenizer, 'last')(chat)) == runs(tokenizer, second)


def test_a_template_without_a_generation_prompt_is_refused():
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    tokenizer = byte_level()
    with pytest.raises(UserError, match=r"no generation prompt: it writes '<assistant>'"):
        ChatEncoder(open_template(source, tokenizer), tokenizer)(Chat(TWO))


@pytest.mark.parametrize(
    'source',
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__['os'] }}",
        '{% set _ = messages.append(messages[0]) %}',
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_templates_cannot_reach_outside_their_sandbox(source):
    tokenizer = byte_level()
    with pytest.raises((UserError, formats.FormatError), match=r'sandbox|refuses'):
        ChatEncoder(open_template(source, tokenizer), tokenizer)(Chat(TWO))


def test_a_given_template_must_compile_and_a_named_one_exist():
    with pytest.raises(UserError, match=r'data\.template: the given template, line 1'):
        open_template('{% for %}', byte_level())
    with pytest.raises(UserError, match=r"data\.template='chatlm': .* \(nearest: chatml\)"):
        open_template('chatlm', byte_level())


def test_named_templates_render_as_transformers_does():
    """The exported tokenizer carries the template: what it renders there is what was trained on."""
    tokenizer = byte_level('<|im_end|>', '<|eot_id|>', bos='<bos>')
    for name in NAMED:
        template = open_template(name, tokenizer)
        tokenizer.chat_template = template.source
        theirs = tokenizer.apply_chat_template(list(FOUR), tokenize=False, add_generation_prompt=False)
        assert theirs == template.render(Chat(FOUR))
        asked = tokenizer.apply_chat_template(list(FOUR[:2]), tokenize=False, add_generation_prompt=True)
        assert asked == template.render(Chat(FOUR[:2]), True)


@pytest.mark.parametrize('name', ['dolly_en', 'gpteacher_codegen_en', 'toolcall_multiturn_en', 'toolcall_multiturn_zh'])
def test_real_conversations_train_their_answers(shared, name):
    lines = (shared / 'data' / 'sft' / f'{name}.jsonl').read_text().splitlines()[:40]
    tokenizer = ours.load(str(shared / 'data' / 'tokenizers' / 'gpt2'))
    kind = 'sharegpt' if 'multiturn' in name else 'alpaca'
    encode = ChatEncoder(open_template('chatml', tokenizer), tokenizer)
    for line in lines:
        chat = formats.chat(kind, 'here', json.loads(line))
        (found,) = encode(chat)
        answers = [turn['content'] for turn in chat.turns if turn['role'] == 'assistant']
        trained = tokenizer.decode(found.ids[found.assistant_mask > 0].tolist())
        assert trained == ''.join(answer + '<|endoftext|>' for answer in answers)
        last = max(i for i, turn in enumerate(chat.turns) if turn['role'] == 'assistant')
        text = encode.template.render(chat.before(last + 1))
        assert tokenizer.decode(found.ids.tolist()) == text.removesuffix('\n')
        assert not np.any(found.assistant_mask[:3])


def test_an_eos_after_the_last_turn_only_is_no_part_of_a_turn():
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = byte_level('<|end|>')
    found = runs(tokenizer, ChatEncoder(open_template(source, tokenizer), tokenizer)(Chat(FOUR[1:])))
    assert [text for text, trained in found if trained] == [' yes 你好<|end|>', '4<|end|>']
    assert '<eos>' not in ''.join(text for text, _ in found)


def test_a_template_that_leaves_answers_out_is_refused():
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content if part.text %}{{ part.text }}"
        "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"does not write the answer of turn 2, 'yes 你好'"):
        ChatEncoder(open_template(source, byte_level()), byte_level())(Chat(TWO))


def test_marks_are_taken_as_transformers_takes_them():
    tokenizer = byte_level('<|im_end|>')
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}"
        "{{ '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = source
    theirs = tokenizer.apply_chat_template(
        list(FOUR), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (found,) = ChatEncoder(open_template('auto', tokenizer), tokenizer)(Chat(FOUR))
    assert found.ids.tolist() == theirs['input_ids']
    assert found.assistant_mask.astype(int).tolist() == theirs['assistant_masks']
    last = runs(tokenizer, ChatEncoder(open_template('auto', tokenizer), tokenizer, 'last')(Chat(FOUR)))
    assert [text for text, trained in last if trained] == ['\n4<|im_end|>\n']
