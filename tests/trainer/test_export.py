"""An exported folder holds what was trained: its tokenizer and no other, its template, its end tokens, its dtype."""

import json

import jax
import numpy as np
import pytest
from runs import MODELS, write_recipe

from jaxtune import main, models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.templates import open_template
from jaxtune.models import hf
from jaxtune.models.safetensors import read_header

OLD_END = 259


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder in bfloat16 with a tokenizer whose end token is one of its own, and files that name its tokens."""
    folder = tmp_path_factory.mktemp('export') / 'base'
    tokenizer = tokenizers.load('bytes')
    tokenizer.add_special_tokens({'additional_special_tokens': ['<old>', '<end>'], 'eos_token': '<end>'})
    tokenizer.chat_template = '{% for m in messages %}{{ m.content }}<end>{% endfor %}'
    fields = MODELS['sft'] | {'vocab_size': 320, 'eos_token_id': OLD_END, 'pad_token_id': 256}
    model = models.build(models.read_config(fields), param_dtype='bfloat16')
    params = jax.jit(model.init)(jax.random.key(0))
    dtypes = dict.fromkeys(model.tensors, np.dtype('bfloat16'))
    hf.save(folder, model, params, add_files=tokenizer.save_pretrained, dtypes=dtypes)
    (folder / 'special_tokens_map.json').write_text(json.dumps({'eos_token': '<old>', 'pad_token': '<old>'}))
    (folder / 'chat_template.json').write_text(json.dumps({'chat_template': 'OLD'}))
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [OLD_END, 0], 'top_p': 0.5}))
    return folder


def run(tmp_path, name, **keys):
    keys = {key.replace('__', '.'): value for key, value in keys.items()}
    path = write_recipe(tmp_path / f'{name}.py', keys)
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / name)]) == 0
    return tmp_path / name


def generation(folder):
    return json.loads((folder / 'generation_config.json').read_text())


def dtypes(folder):
    return {str(entry.dtype) for entry in read_header(folder / 'model.safetensors').values()}


def lora(base, tmp_path, **keys):
    record = {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]}
    (tmp_path / 'train.jsonl').write_text(json.dumps(record) + '\n')
    keys |= {'data__train': str(tmp_path / 'train.jsonl'), 'model__path': str(base), 'mesh__data': 1, 'mesh__fsdp': 8}
    keys |= {'objective': 'sft', 'method__name': 'lora', 'method__rank': 2, 'optimizer__warmup_steps': 0}
    return run(tmp_path, 'lora', data__seq_len=64, train__steps=1, train__batch_size=8, **keys)


def test_task_export_gives_the_folder_back(base, tmp_path):
    out = run(tmp_path, 'out', task='export', model__path=str(base), mesh__data=1, mesh__fsdp=8) / 'export'
    mine, its = (read_header(folder / 'model.safetensors') for folder in (out, base))
    assert {name: entry.read().tobytes() for name, entry in mine.items()} == {
        name: entry.read().tobytes() for name, entry in its.items()
    }
    assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'
    assert generation(out).items() >= {'eos_token_id': [OLD_END, 0], 'top_p': 0.5}.items()
    told = run(tmp_path, 'told', task='export', model__path=str(base), export__dtype='float32') / 'export'
    assert dtypes(told) == {'float32'}


def test_another_tokenizer_comes_alone_and_its_template_with_an_adapter(base, tmp_path):
    from transformers import AutoTokenizer

    new = tokenizers.load('bytes')
    new.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    new.save_pretrained(tmp_path / 'new')
    trained = lora(base, tmp_path, tokenizer__path=str(tmp_path / 'new'), data__template='chatml')
    template = open_template('chatml', new).source
    keys = {'task': 'export', 'model__path': str(base), 'method__path': str(trained)}
    for folder in (trained / 'export', run(tmp_path, 'later', **keys) / 'export'):
        again = AutoTokenizer.from_pretrained(folder)
        assert (again.eos_token, again.pad_token, again.chat_template) == ('<eos>', '<pad>', template)
        assert again('a<|im_end|>').input_ids == new('a<|im_end|>').input_ids
        assert not {'special_tokens_map.json', 'chat_template.json'} & {path.name for path in folder.iterdir()}
        assert generation(folder)['eos_token_id'] == [257, new.convert_tokens_to_ids('<|im_end|>')]
        assert dtypes(folder) == {'bfloat16'}
