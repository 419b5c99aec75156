"""Conversations are trained as they are served, with templates of the structure of published ones."""

import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'trainer'))

from published_templates import PUBLISHED
from runs import full_config
from test_chat_encoder import byte_level, runs

from jaxtune import models
from jaxtune.data import formats
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.chat_encoder import ChatEncoder
from jaxtune.data.examples import ExampleRows, Examples
from jaxtune.data.formats import FormatError
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError
from jaxtune.models import hf
from jaxtune.tasks import specs

SYSTEM = {'role': 'system', 'content': 'Be kind.'}
TOOL = {'type': 'function', 'function': {'name': 'weather', 'parameters': {'type': 'object'}}}
CALL = {'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Zürich'}}}


def ask(content):
    return {'role': 'user', 'content': content}


def say(content, **more):
    return {'role': 'assistant', 'content': content, **more}


THREE = [ask('Hi?'), say('Hello'), ask('And 2+2?'), say(' 4 '), ask('Thanks'), say('yes\n你好')]
THOUGHTS = [turn | {'reasoning_content': 'Let me see.'} if turn['role'] == 'assistant' else turn for turn in THREE]
CASES = {
    'one exchange': {'messages': THREE[:2]},
    'three exchanges': {'messages': THREE},
    'system': {'messages': [SYSTEM, *THREE]},
    'tools': {
        'messages': [ask('Rain?'), say('', tool_calls=[CALL]), {'role': 'tool', 'content': '21'}, say('Dry'), *THREE],
        'tools': [TOOL],
    },
    'thinking in history': {'messages': [*THOUGHTS[:4], *THREE[4:]]},
    'thinking last': {'messages': [*THREE[:4], *THOUGHTS[4:]]},
    'thinking always': {'messages': THOUGHTS},
    'thinking in the text': {
        'messages': [say(f'<think>\nHm.\n</think>\n\n{m["content"]}') if m['role'] == 'assistant' else m for m in THREE]
    },
    'empty content': {'messages': [*THREE[:3], say(''), *THREE[4:]]},
}
THINKS = ('thinking in history', 'thinking last', 'thinking always')
CLOSED = ('qwen3, no thinking', 'qwen3.5, no thinking', 'smollm3, no thinking')
UNTHINKING = (
    'llama3', 'qwen2.5', 'mistral v0.3', 'mistral tekken', 'gemma', 'gemma3', 'phi3', 'phi4', 'deepseek r1, first',
    'command-r', 'glm-4', 'smollm3',
)  # fmt: skip
# (template, case) -> what the refusal says beside the turn, where the two do not go together.
OPEN = ('qwen3.5', 'deepseek r1')  # they ask for thinking
HARMLESS = ('thinking always', 'thinking in the text')
REFUSED = {
    **{(name, case): 'does not write the reasoning of turn' for name in (*UNTHINKING, CLOSED[2]) for case in THINKS},
    **{(name, case): 'after another text than' for name in CLOSED[:2] for case in (*THINKS, 'thinking in the text')},
    **{(name, case): 'holds no reasoning' for name in OPEN for case in CASES if case not in HARMLESS},
    ('gemma', 'system'): 'System role not supported',
    **{(name, 'tools'): 'does not write the' for name in ('gemma', 'gemma3', 'phi3', 'phi4', 'command-r')},
    **{(name, 'tools'): 'does not write the' for name in ('smollm3', 'smollm3, no thinking', 'deepseek r1, first')},
}


def tokenizer_of(published):
    tokenizer = byte_level(*published.tokens, eos=published.eos, pad='<pad>', bos=published.bos)
    tokenizer.chat_template = published.source
    return tokenizer


def served(tokenizer, record, number, args):
    """What `transformers` hands to a model that is asked for a turn, as text and ids."""
    turns = []
    for turn in record['messages'][:number]:
        thought = turn.get('reasoning_content')
        turns.append(turn if thought is None else turn | {'thinking': thought})
    given = {'tools': record.get('tools'), 'add_generation_prompt': True, **args}
    text = tokenizer.apply_chat_template(turns, tokenize=False, **given)
    return text, tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **given)['input_ids']


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', PUBLISHED)
def test_what_stands_before_an_answer_is_what_is_served(name, case):
    published, record = PUBLISHED[name], CASES[case]
    tokenizer, args = tokenizer_of(published), dict(published.args)
    template = open_template('auto', tokenizer, args=args)
    chat = formats.chat('messages', 'here', json.loads(json.dumps(record)))
    encode = ChatEncoder(template, tokenizer)
    if (name, case) in REFUSED:
        with pytest.raises((UserError, FormatError)) as caught:
            encode(chat)
        assert REFUSED[name, case] in str(caught.value)
        assert 'turn' in str(caught.value) or 'record' in str(caught.value)
        assert '\n' not in str(caught.value)
        return
    rows = encode(chat)
    answers = [i for i, turn in enumerate(record['messages']) if turn['role'] == 'assistant']
    trained = []
    for row in rows:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.assistant_mask > 0, [0]])))
        trained += [(row, *pair) for pair in edges.reshape(-1, 2).tolist()]
    assert len(trained) == len(answers)
    for number, (row, start, end) in zip(answers, trained, strict=True):
        text, ids = served(tokenizer, record, number, args)
        assert row.ids[:start].tolist() == ids
        written, turn = tokenizer.decode(row.ids[start:end].tolist()), record['messages'][number]
        assert ''.join(turn['content'].split()).removeprefix('<think>') in ''.join(written.split())
        assert ('Let me see.' in written) == ('reasoning_content' in turn)
        assert ('weather' in written) == ('tool_calls' in turn)
        assert written.endswith((*published.tokens, published.eos))
        assert '<think>\n\n</think>' not in written
        # One turn's: no header of a turn, neither its own nor the next one's.
        assert not any(
            mark in written for mark in ('im_start', 'header_id', '<|user|>', '<start_of_turn>', '[INST]', '<|START|>')
        )
        assert text + written.rstrip() in tokenizer.decode(row.ids[:end].tolist()) + '\n'


def test_three_exchanges_of_a_template_that_drops_thinking():
    tokenizer = tokenizer_of(PUBLISHED['qwen3'])
    plain = ChatEncoder(open_template('auto', tokenizer), tokenizer)(
        formats.chat('messages', '', CASES['three exchanges'])
    )
    (row,) = plain  # nothing is rewritten once the empty block is not taken for an answer
    assert [text for text, trained in runs(tokenizer, row) if trained] == [
        'Hello<|im_end|>', ' 4 <|im_end|>', 'yes\n你好<|im_end|>',
    ]  # fmt: skip
    thinking = ChatEncoder(open_template('auto', tokenizer), tokenizer)(
        formats.chat('messages', '', CASES['thinking always'])
    )
    assert len(thinking) == 3
    assert [runs(tokenizer, row)[-1][0] for row in thinking] == [
        f'<think>\nLet me see.\n</think>\n\n{answer}<|im_end|>' for answer in ('Hello', ' 4 ', 'yes\n你好')
    ]
    assert 'Let me see.' not in runs(tokenizer, thinking[-1])[0][0]


def test_weights_of_turns_and_records_reach_the_tokens():
    tokenizer = tokenizer_of(PUBLISHED['qwen2.5'])
    turns = [*THREE[:1], say('Hello', weight=0.5), THREE[2], say('4', train=False), THREE[4], say('yes', train=True)]
    template = open_template('auto', tokenizer)
    chat = formats.chat('messages', 'here', {'messages': turns, 'weight': 3})

    def weighed(train_on):
        (row,) = ChatEncoder(template, tokenizer, train_on)(chat)
        places = np.flatnonzero(row.assistant_mask)
        return {
            weight: tokenizer.decode(row.ids[places[row.assistant_mask[places] == weight]].tolist())
            for weight in np.unique(row.assistant_mask[places]).tolist()
        }

    assert weighed('all') == {1.5: 'Hello<|im_end|>', 3.0: 'yes<|im_end|>'}
    assert weighed('marked') == {3.0: 'yes<|im_end|>'}
    assert weighed('last') == {3.0: 'yes<|im_end|>'}
    assert 'weight' not in template.render(chat)
    assert ChatEncoder(template, tokenizer, 'marked')(formats.chat('messages', 'here', {'messages': THREE})) == []


CALLERS = {
    'a mapping is wanted': "{% for k, v in call.function.arguments | items %}{{ k + '=' + v }}{% endfor %}",
    'a mapping is written as JSON': '{{ call.function.arguments | tojson }}',
    'a text is wanted': "{{ '>' + call.function.arguments }}",
    'a text is written': '{{ call.function.arguments }}',
}


@pytest.mark.parametrize('wanted', CALLERS)
def test_arguments_of_calls_come_as_a_template_takes_them(wanted):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + '(' }}" + CALLERS[wanted] + "{{ ')' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = byte_level('<|im_start|>', '<|im_end|>')
    encode = ChatEncoder(open_template(source, tokenizer), tokenizer)
    written = set()
    for arguments in ({'city': 'Zürich'}, '{"city": "Zürich"}'):
        call = {'function': {'name': 'weather', 'arguments': arguments}}
        (row,) = encode(formats.chat('messages', 'here', {'messages': [ask('Rain?'), say('', tool_calls=[call])]}))
        written.add(runs(tokenizer, row)[-1][0])
    shown = 'city=Zürich' if wanted == 'a mapping is wanted' else '{"city": "Zürich"}'
    (text,) = written
    assert text.removeprefix('weather(').removeprefix('>') == f'{shown})<|im_end|>'


def test_documents_and_arguments_of_a_template():
    source = (
        "{{ style }}{% for d in documents or [] %}{{ '[' + d.title + ']' }}{% endfor %}" + PUBLISHED['qwen2.5'].source
    )
    tokenizer = byte_level('<|im_start|>', '<|im_end|>')
    template = open_template(source, tokenizer, args={'style': 'terse ', 'documents': [{'title': 'Given'}]})
    record = {'messages': THREE[:2]}
    for more, expected in (
        ({}, 'terse [Given]'),
        ({'documents': [{'title': 'Own'}], 'chat_template_kwargs': {'style': 'long '}}, 'long [Own]'),
    ):
        text, _ = ChatEncoder(template, tokenizer).prompt(formats.chat('messages', 'here', record | more))
        assert text.startswith(expected + '<|im_start|>')
    deaf = ChatEncoder(open_template(PUBLISHED['qwen2.5'].source, tokenizer), tokenizer)
    with pytest.raises(FormatError, match="does not write the record's documents"):
        deaf(formats.chat('messages', 'here', record | {'documents': [{'title': 'Own'}]}))


@pytest.mark.parametrize('name', ['toolcall_multiturn_en', 'toolcall_multiturn_zh', 'dolly_en', 'gpteacher_codegen_en'])
def test_real_conversations_train_the_tokens_and_have_the_loss_of_trl(shared, name):
    """With a template that marks answers: ids and mask of `assistant_only_loss`, and its mean over those tokens."""
    trl, torch = pytest.importorskip('trl'), pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    source = (pathlib.Path(trl.__file__).parent / 'chat_templates' / 'qwen3_training.jinja').read_text()
    tokenizer = tokenizers.load(str(shared / 'data' / 'tokenizers' / 'gpt2'))
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    template = open_template(source, tokenizer)
    tokenizer.chat_template = source
    encode, kind = ChatEncoder(template, tokenizer), 'sharegpt' if 'multiturn' in name else 'alpaca'
    lines = (shared / 'data' / 'sft' / f'{name}.jsonl').read_text().splitlines()[:50]
    compared = []
    for line in lines:
        chat = formats.chat(kind, 'here', json.loads(line))
        last = max(i for i, turn in enumerate(chat.turns) if turn['role'] == 'assistant')
        theirs = tokenizer.apply_chat_template(
            list(chat.before(last + 1).turns), tools=json.loads(chat.tools) if chat.tools else None, tokenize=True,
            return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        (row,) = encode(chat)
        assert row.ids.tolist() == theirs['input_ids']
        assert row.assistant_mask.tolist() == theirs['assistant_masks']
        compared.append(row)
    assert len(compared) == len(lines)

    fields = {
        'model_type': 'llama', 'vocab_size': len(tokenizer), 'hidden_size': 16, 'intermediate_size': 32,
        'num_hidden_layers': 1, 'num_attention_heads': 2, 'max_position_embeddings': 1024,
    }  # fmt: skip
    model = models.build(models.read_config(fields))
    params = model.init(jax.random.key(0))
    short = [row for row in compared if len(row.ids) <= 512][:6]
    rows = ExampleRows(Examples.of(short), 512, packing=True)
    batch = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
    loss, count, _ = specs.objective(full_config({'objective': 'sft'})).loss(model, params, batch, None)
    with tempfile.TemporaryDirectory() as folder:
        hf.save(pathlib.Path(folder), model, params)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total, scored = 0.0, 0
    for row in short:
        ids = torch.tensor(row.ids[None]).long()
        labels = torch.where(torch.tensor(row.assistant_mask[None]) > 0, ids, -100)
        with torch.no_grad():
            logits = reference(ids).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction='sum'))
        scored += int((labels[:, 1:] >= 0).sum())
    assert count == scored
    assert float(loss / count) == pytest.approx(total / scored, rel=1e-5)


def test_the_likelihood_of_an_answer_is_that_after_the_served_prompt():
    """What the trainer measures of Qwen3's structure, `transformers` measures after the prompt that it serves."""
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    tokenizer = tokenizer_of(PUBLISHED['qwen3'])
    fields = {
        'model_type': 'qwen3', 'vocab_size': len(tokenizer), 'hidden_size': 16, 'intermediate_size': 32, 'head_dim': 8,
        'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 1, 'initializer_range': 0.3,
    }  # fmt: skip
    model = models.build(models.read_config(fields))
    params = model.init(jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(pathlib.Path(folder), model, params)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for args in ({}, {'enable_thinking': False}):
        record = CASES['three exchanges' if args else 'thinking always']
        encode = ChatEncoder(open_template('auto', tokenizer, args=args), tokenizer)
        examples = encode(formats.chat('messages', 'here', record))
        rows = ExampleRows(Examples.of(examples), 256, packing=True)
        batch = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
        loss, count, _ = specs.objective(full_config({'objective': 'sft'})).loss(model, params, batch, None)
        total, scored = 0.0, 0
        for number, turn in enumerate(record['messages']):
            if turn['role'] != 'assistant':
                continue
            _, ids = served(tokenizer, record, number, args)
            thought = '' if args else '<think>\nLet me see.\n</think>\n\n'
            answer = tokenizer(f'{thought}{turn["content"]}<|im_end|>', add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = reference(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction='sum'))
            scored += len(answer)
        assert count == scored
        assert float(loss / count) == pytest.approx(total / scored, rel=1e-5)
