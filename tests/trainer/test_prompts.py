"""The prompts of a recipe's data: however it is named, whatever its fields, and how many of them fit."""

import json

import jax
import pytest
from runs import full_config, metrics, recipe, train

from jaxtune.data.templates import NAMED
from jaxtune.generation.prompts import Prompt, read_prompts
from jaxtune.metrics.samples import read_samples
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.tasks import specs

CONVERSATION = {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]}


@pytest.fixture(scope='module')
def mesh():
    return make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


@pytest.fixture(scope='module')
def parts(corpus, mesh):
    with jax.set_mesh(mesh):
        return load_model(specs.model_spec(full_config(recipe(corpus))), mesh)


@pytest.fixture(autouse=True)
def _no_template(parts, monkeypatch):
    """Reading conversations gives the tokenizer their template."""
    monkeypatch.setattr(parts.tokenizer, 'chat_template', None)


@pytest.fixture
def prompts(corpus, parts):
    def read(path, fitting: bool = False, **changes) -> list[Prompt]:
        changes = {'generate__max_new_tokens': 16, **changes}
        spec = specs.prompt_spec(full_config(recipe(corpus, data__eval=str(path), **changes)))
        return read_prompts(spec, parts, fitting=fitting)

    return read


def write(file, *records):
    file.parent.mkdir(exist_ok=True)
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return file


def test_conversations_are_the_same_by_any_name(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in 'ab':
        write(tmp_path / 'q' / f'{name}.jsonl', CONVERSATION | {'text': 'beside'})
    found = prompts(tmp_path / 'q')
    assert [prompt.text for prompt in found] == [CONVERSATION['messages'][:1]] * 2
    assert [prompt.reference for prompt in found] == ['Hello'] * 2
    for path in (tmp_path / 'q' / '*.jsonl', '~/q', '~/q/*.jsonl', '~/q/[ab].jsonl'):
        assert prompts(path) == found


@pytest.mark.parametrize(
    ('record', 'expected'),
    [
        ({'prompt': 'Why?'}, ('Why?', None)),
        ({'prompt': 'Why?', 'completion': 'So.'}, ('Why?', 'So.')),
        ({'question': 'Why?', 'answer': 'So.'}, ('Why?', 'So.')),
        ({'source': 'Why?', 'target': 'So.'}, ('Why?', 'So.')),
        ({'text': 'Why?', 'prompt': 'another'}, ('Why?', None)),
        ({'prompt': [{'role': 'user', 'content': 'Why?'}]}, ([{'role': 'user', 'content': 'Why?'}], None)),
    ],
)
def test_prompts_are_found_by_their_fields(prompts, tmp_path, record, expected):
    (found,) = prompts(write(tmp_path / 'a.jsonl', record))
    assert (found.text, found.reference) == expected


def test_prompts_that_do_not_fit_are_counted(prompts, tmp_path, capsys):
    file = write(tmp_path / 'a.jsonl', *({'prompt': 'x' * size} for size in (5, 500, 0, 700)))
    assert [len(prompt.ids) for prompt in prompts(file, fitting=True, generate__max_new_tokens=100)] == [5]
    said = ' '.join(capsys.readouterr().out.split())
    assert (
        '3 of 4 prompts are left out: empty, or too long to have generate.max_new_tokens=100 after them in 128' in said
    )


def test_samples_that_cannot_be_drawn_do_not_stop_training(tmp_path, capsys):
    file = write(tmp_path / 'a.jsonl', *([{'prompt': 'x' * 40, 'completion': 'y'}] * 8))
    keys = recipe(tmp_path, 'sft', train__steps=2, train__batch_size=4, eval__samples=2, eval__batch_size=4)
    keys |= {'data.train': str(file), 'data.eval': str(file), 'generate.max_new_tokens': 100}
    train(keys, tmp_path / 'run')
    assert len(metrics(tmp_path / 'run', 'train/loss')) == 2
    assert read_samples(tmp_path / 'run') == []
    said = ' '.join(capsys.readouterr().out.split())
    assert 'eval.samples=2: none is written: no prompt of data.eval leaves room for generate.max_new_tokens=100' in said


QUESTION = {'question': 'How many?', 'answer': 'Two.\n#### 2'}


QUESTIONS = (
    QUESTION,
    {'prompt': QUESTION['question'], 'completion': QUESTION['answer']},
    {'instruction': QUESTION['question'], 'output': QUESTION['answer']},
    {'messages': [{'role': 'user', 'content': 'How many?'}, {'role': 'assistant', 'content': QUESTION['answer']}]},
    {'conversations': [{'from': 'human', 'value': 'How many?'}, {'from': 'gpt', 'value': QUESTION['answer']}]},
)
# What alpaca writes around an instruction is longer than this model's positions.
ASKED = [
    (record, templated) for record in QUESTIONS for templated in (True, False) if templated or 'output' not in record
]


@pytest.mark.parametrize(('record', 'templated'), ASKED)
def test_rewards_learn_from_every_format_of_questions(parts, corpus, tmp_path, record, templated, monkeypatch):
    """With a template, a question is asked as it is in a conversation; the record's answer is the reference."""
    tokenizer = parts.tokenizer
    monkeypatch.setattr(tokenizer, 'chat_template', NAMED['chatml'][1].replace('EOT', "'!'") if templated else None)
    path = write(tmp_path / 'q' / 'asked.jsonl', record)
    config = full_config(recipe(corpus, task='grpo', data__train=str(path), data__eval='', generate__max_new_tokens=8))
    (prompt,) = read_prompts(specs.prompt_spec(config), parts, split='train')
    assert prompt.reference == QUESTION['answer']
    shown = tokenizer.decode(prompt.ids)
    if templated:
        assert shown == '<|im_start|>user\nHow many?!\n<|im_start|>assistant\n'
    else:
        assert 'How many?' in shown
        assert ('assistant' in shown) == (next(iter(record)) not in ('question', 'prompt'))
