"""What a person may hand in wrong: one line on stderr that names it and says what was expected, exit status 2."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from runs import recipe, write_recipe

from jaxtune import main


class Case:
    """One mistake: it changes a good recipe, a copy of the model folder, or the command line."""

    def __init__(self, name, *expected, keys=None, flags=(), break_model=None, break_data=None):
        self.name, self.expected, self.keys, self.flags = name, expected, keys or {}, flags
        self.break_model, self.break_data = break_model, break_data


def _only(folder, *names):
    for file in folder.iterdir():
        if file.name not in names and 'token' not in file.name:
            file.unlink()


def _without_weights(folder):
    (folder / 'model.safetensors').unlink()


def _pickled(folder):
    _without_weights(folder)
    (folder / 'pytorch_model.bin').write_bytes(pickle.dumps({'never': 'read'}))


def _truncated(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])


def _edit(name, **fields):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))

    return edit


def _edit_config(**fields):
    return _edit('config.json', **fields)


def _with_weight(value):
    """One number of one tensor becomes another."""

    def edit(folder):
        path = folder / 'model.safetensors'
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], 'little')
        start, _ = json.loads(data[8 : 8 + size])['model.layers.1.mlp.up_proj.weight']['data_offsets']
        data[8 + size + start + 40 : 8 + size + start + 44] = np.float32(value).tobytes()
        path.write_bytes(data)

    return edit


def _with_header(change):
    """The header of the weights becomes another text."""

    def edit(folder):
        path = folder / 'model.safetensors'
        data = path.read_bytes()
        size = int.from_bytes(data[:8], 'little')
        text = change(data[8 : 8 + size].decode()).encode()
        path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])

    return edit


def _with_index(file):
    def edit(folder):
        (folder / 'model.safetensors').rename(folder / 'model-00001-of-00001.safetensors')
        weight_map = {'model.norm.weight': file, 'lm_head.weight': 'model-00001-of-00001.safetensors'}
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))

    return edit


def _edit_tokenizer(change):
    def edit(folder):
        path = folder / 'tokenizer.json'
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit


def _no_vocabulary(value):
    value['model']['vocab'], value['added_tokens'] = {}, []


def _backtracks(value):
    pattern = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated', 'invert': False}
    value['pre_tokenizer'] = pattern


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _pipe_for_config(folder):
    (folder / 'config.json').unlink()
    os.mkfifo(folder / 'config.json')


def _broken_line(folder):
    with open(folder / 'train.jsonl', 'a') as file:
        file.write('{"text": "unfinished\n')


def _lines(*lines):
    return lambda folder: (folder / 'train.jsonl').write_text('\n'.join(lines) + '\n' if lines else '')


CASES = (
    Case('misspelt key', 'train.stpes', 'nearest', 'train.steps', flags=['--config.train.stpes=3']),
    Case('misspelt key in the recipe', 'optimizer.learning', 'unknown key', keys={'optimizer.learning': 1}),
    Case(
        'misspelt model field', 'model.config.hiden_size', 'hidden_size', flags=['--config.model.config.hiden_size=8']
    ),
    Case('impossible value', 'optimizer.schedule', 'cosine', keys={'optimizer.schedule': 'cosin'}),
    Case('wrong type', 'train.batch_size', 'integer', flags=['--config.train.batch_size=many']),
    Case('unknown flag', 'overwrit', flags=['--overwrit']),
    Case('missing model folder', 'model.path', 'no such folder', keys={'model.path': '/not/there'}),
    Case('folder without weights', 'model.safetensors', break_model=_without_weights),
    Case('pickled weights', 'pytorch_model.bin', 'pickled', 'model.safetensors', break_model=_pickled),
    Case('truncated weights', 'model.safetensors', 'truncated', break_model=_truncated),
    Case('folder without config', 'config.json', break_model=lambda folder: (folder / 'config.json').unlink()),
    Case('unknown model type', 'model_type', 'expected one of', break_model=_edit_config(model_type='lama')),
    Case('other shapes', 'expected', 'tensor', break_model=_edit_config(intermediate_size=96)),
    Case('too small a vocabulary', '255', '200', 'vocab', break_model=_edit_config(vocab_size=200)),
    Case('NaN', 'model.layers.1.mlp.up_proj.weight', 'finite', break_model=_with_weight(float('nan'))),
    Case('infinity', 'model.layers.1.mlp.up_proj.weight', 'finite', break_model=_with_weight(float('-inf'))),
    Case('header too deep', 'model.safetensors', break_model=_with_header(lambda text: '[' * 50_000 + ']' * 50_000)),
    Case('infinite offset', 'model.safetensors', break_model=_with_header(lambda text: text.replace('0', '1e400', 1))),
    Case(
        'no whole offset', 'model.safetensors', break_model=_with_header(lambda text: text.replace('[0,', '[0.5,', 1))
    ),
    Case('index names a number', 'model.safetensors.index.json', 'weight_map', break_model=_with_index(7)),
    Case('index names a long name', 'xxx', 'is missing', break_model=_with_index('x' * 5000)),
    Case('architectures', 'config.json', 'architectures', 'texts', break_model=_edit_config(architectures=5)),
    Case('no heads', 'num_key_value_heads=0', '>= 1', break_model=_edit_config(num_key_value_heads=0)),
    Case('negative width', 'hidden_size=-8', '>= 1', break_model=_edit_config(hidden_size=-8)),
    Case('huge vocabulary', 'vocab_size', '<= 2147483647', break_model=_edit_config(vocab_size=10**12)),
    Case('huge depth', 'num_hidden_layers', '<= 10000', break_model=_edit_config(num_hidden_layers=2**31 - 1)),
    Case('more heads than width', 'config.json', 'attention heads', break_model=_edit_config(num_attention_heads=64)),
    Case(
        'rope_theta 0',
        'config.json',
        'rope_theta',
        break_model=_edit_config(rope_parameters={'rope_type': 'default', 'rope_theta': 0.0}),
    ),
    Case('config too deep', 'config.json', 'deeply', break_model=_write('config.json', '{"a": ' * 100_000)),
    Case('config of digits', 'config.json:1', 'JSON', break_model=_write('config.json', '{"a": ' + '9' * 5000 + '}')),
    Case('config is a pipe', 'config.json', 'a file', break_model=_pipe_for_config),
    Case('generation config a list', 'generation_config.json:1', break_model=_write('generation_config.json', '[1]')),
    Case('end token a text', 'eos_token_id', break_model=_edit('generation_config.json', eos_token_id='</s>')),
    Case('half a character', 'tokenizer_config.json', break_model=_edit('tokenizer_config.json', extra='\ud800')),
    Case('empty vocabulary', 'model.path', 'vocabulary', break_model=_edit_tokenizer(_no_vocabulary)),
    Case('pattern without end', 'model.path', 'Onig', break_model=_edit_tokenizer(_backtracks)),
    Case('hub that is not there', 'model.path=no-such/model', 'HF_HUB_OFFLINE', keys={'model.path': 'no-such/model'}),
    Case('template before weights', 'chatml', keys={'data.template': 'chatlm'}, break_model=_with_weight(float('nan'))),
    Case('data before weights', 'data.train=gone.txt', keys={'data.train': 'gone.txt'}, break_model=_without_weights),
    Case('no data', 'data.train', 'expected', keys={'data.train': ''}),
    Case('missing data', 'data.train', 'no such file', keys={'data.train': 'not/there.jsonl'}),
    Case('empty data', 'data.train', 'empty', break_data=_lines()),
    Case('broken line', 'train.jsonl:61', 'JSON', break_data=_broken_line),
    Case('no text field', 'train.jsonl:2', "'text'", break_data=_lines('{"text": "a b c"}', '{"txt": "a"}')),
    Case(
        'nothing to predict',
        'update 1: none of the tokens',
        'expected records',
        keys={'data.append_eos': False, 'data.packing': False, 'train.batch_size': 8},
        break_data=_lines(*['{"text": "a"}'] * 9),
    ),
    Case('mesh and devices', 'mesh.data=3', '8', keys={'mesh.data': 3}),
    Case('two sizes open', 'mesh', '-1', keys={'mesh.data': -1, 'mesh.fsdp': -1}),
    Case('batch and mesh', 'train.batch_size', 'multiple', keys={'train.batch_size': 12}),
    Case('batch and micro-batches', 'train.accumulate', 'multiple', keys={'train.accumulate': 3}),
    Case('too many tokens', 'train.batch_size=1048576', keys={'train.batch_size': 2**20, 'data.seq_len': 2**24}),
    Case('length and mesh', 'data.seq_len', 'mesh.sequence', keys={'mesh.sequence': 8, 'data.seq_len': 60}),
    Case('beyond the positions', 'data.seq_len', '128', keys={'data.seq_len': 256}),
    Case('unknown eval metric', 'eval.metric', 'eval/loss', keys={'eval.metric': 'eval/los', 'eval.every': 2}),
    Case('flash on a CPU', 'model.attention', 'cpu', keys={'model.attention': 'flash'}),
    Case('stage that is not there', 'data.train', '@prepare', keys={'data.train': '@prepare'}),
    Case(
        'targets that are not there',
        "method.targets: 'query'",
        'q_proj',
        keys={'method.name': 'lora', 'method.targets': ('query', 'v_proj')},
    ),
    Case('rank 0', 'method.rank', 'integer >= 1', flags=['--config.method.rank=0']),
    Case('rank above the matrix', 'method.rank=99', '_proj', keys={'method.name': 'lora', 'method.rank': 99}),
    Case('LoftQ without NF4', 'method.init=loftq', 'qlora', keys={'method.name': 'lora', 'method.init': 'loftq'}),
    Case('no adapter there', 'method.path', 'adapter_config.json', keys={'method.name': 'lora', 'method.path': '/tmp'}),
    Case(
        'diverges',
        'update 2',
        'nan',
        'smaller optimizer.lr',
        'checkpoint',
        keys={'optimizer.lr': 1e30, 'optimizer.name': 'sgd', 'train.steps': 9},
    ),
)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_one_line_and_exit_2(case, corpus, model, tmp_path, capsys, caplog):
    data = shutil.copytree(corpus, tmp_path / 'data')
    if case.break_data:
        case.break_data(data)
    keys = recipe(data)
    if case.break_model:
        keys['model.path'] = str(shutil.copytree(model, tmp_path / 'model'))
        keys.pop('tokenizer.path')
        keys.pop('model.config')
        case.break_model(tmp_path / 'model')
    keys |= case.keys
    path = write_recipe(tmp_path / 'recipe.py', keys)
    status = main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run'), *case.flags])
    output = capsys.readouterr()
    assert status == 2, output.out
    assert output.err.count('\n') == 1, output.err
    assert output.err.startswith('jaxtune: ')
    assert 'Traceback' not in output.err + output.out
    for words in case.expected:
        assert words in output.err
    assert not (tmp_path / 'run' / 'result.json').exists()


def test_the_good_recipe_of_these_cases_runs(corpus, model, tmp_path, capsys):
    keys = recipe(corpus, model__path=str(model), train__steps=2) | {'tokenizer.path': ''}
    keys.pop('model.config')
    path = write_recipe(tmp_path / 'recipe.py', keys)
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]) == 0
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('task', ['evaluate', 'generate', 'export'])
def test_every_task_refuses_weights_that_are_not_finite(task, corpus, model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / 'model')
    _with_weight(float('nan'))(folder)
    keys = recipe(corpus, model__path=str(folder), task=task) | {'tokenizer.path': ''}
    keys.pop('model.config')
    path = write_recipe(tmp_path / 'recipe.py', keys)
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert 'tensor model.layers.1.mlp.up_proj.weight' in error
    assert not (tmp_path / 'run' / 'result.json').exists()


def test_a_model_that_is_not_there_is_named_by_its_key(corpus, model, tmp_path, capsys):
    """The reference and the reward model are other keys than `model.path`, and none of them is `tokenizer.path`."""
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'config.json').write_text('{')
    for keys, where in (
        ({'objective': 'dpo', 'dpo.reference': '/not/there'}, 'dpo.reference=/not/there'),
        ({'task': 'grpo', 'rl.reward': '/not/there', 'generate.max_new_tokens': 8}, 'rl.reward=/not/there'),
        ({'model.path': str(tmp_path / 'broken')}, 'broken/config.json:1'),
    ):
        path = write_recipe(
            tmp_path / 'recipe.py', recipe(corpus) | {'model.path': str(model), 'tokenizer.path': ''} | keys
        )
        assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]) == 2
        error = capsys.readouterr().err
        assert where in error
        assert 'tokenizer.path' not in error


def test_samples_need_no_held_out_data(corpus, model, tmp_path, capsys):
    keys = recipe(corpus, model__path=str(model), train__steps=1, eval__samples=2) | {'tokenizer.path': ''}
    keys |= {'data.eval': ''}
    path = write_recipe(tmp_path / 'recipe.py', keys)
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]) == 0, capsys.readouterr()


def test_a_recipe_that_is_no_recipe(tmp_path, capsys):
    for text, expected in (
        ('import sys\nsys.exit(0)\n', 'recipe.py:2'),
        ('import sys\ndef get_config():\n    sys.exit(0)\n', 'recipe.py:3'),
        ('class Odd(BaseException): pass\nraise Odd\n', 'recipe.py:2'),
        ('def get_config(:\n', 'recipe.py:1'),
        ('x = 1\n', 'get_config'),
        ('def get_config():\n    return 1 / 0\n', 'recipe.py:2'),
        ('def get_config():\n    return {}\n', 'ConfigDict'),
    ):
        (tmp_path / 'recipe.py').write_text(text)
        assert main.main(['jaxtune', '--config', str(tmp_path / 'recipe.py')]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        assert expected in error
    assert main.main(['jaxtune', '--config', str(tmp_path / 'none.py')]) == 2
    assert main.main(['jaxtune', '--workdir', str(tmp_path)]) == 2
