"""`--check` reads all that a recipe names, says what is wrong as the run itself would, and leaves nothing behind."""

import json
import math
import pathlib
import resource
import shutil

import numpy as np
import pytest
from runs import OBJECTIVES, recipe, write_recipe

from jaxtune import main, models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.models.model import leaf_paths
from jaxtune.models.safetensors import write_file
from jaxtune.recipe import recipes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def check(folder, keys, *flags):
    """Exit status of the command with `--check`, and whether it left anything in its workdir."""
    path = write_recipe(folder / 'recipe.py', keys)
    status = main.main(['jaxtune', '--config', str(path), '--workdir', str(folder / 'run'), '--check', *flags])
    assert not (folder / 'run').exists()
    return status


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_a_good_recipe_of_each_objective_passes(corpus, tmp_path, capsys, objective):
    assert check(tmp_path, recipe(corpus, objective)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert 'train (' in last
    assert 'rows of data.train' in last
    assert 'rows of data.eval' in last


_LOOP = {
    'rl.rollouts': 8,
    'rl.group': 2,
    'train.batch_size': 8,
    'generate.batch_size': 8,
    'data.format': 'prompt',
    'generate.max_new_tokens': 4,
}
TASKS = {
    'lora': {'method.name': 'lora', 'method.rank': 2},
    'qlora': {'method.name': 'qlora', 'method.rank': 2, 'method.block_size': 16},
    'adapter': {'method.name': 'adapter'},
    'prompt': {'method.name': 'prompt', 'method.virtual_tokens': 2},
    'ppo': {'task': 'ppo', 'rl.reward': 'builtins:max', **_LOOP},
    'grpo': {'task': 'grpo', 'rl.reward': 'builtins:max', **_LOOP},
    'evaluate': {'task': 'evaluate'},
    'generate': {'task': 'generate', 'generate.prompt_tokens': 4, 'generate.batch_size': 8},
    'export': {'task': 'export'},
    'compile': {'task': 'compile'},
    'prepare': {'task': 'prepare'},
}


@pytest.mark.parametrize('name', TASKS)
def test_a_good_recipe_of_each_task_passes(corpus, model, tmp_path, capsys, name):
    keys = recipe(corpus, generate__max_new_tokens=4) | {'model.path': str(model), 'tokenizer.path': ''}
    del keys['model.config']
    keys |= TASKS[name]
    assert check(tmp_path, keys) == 0
    assert f'{keys.get("task", "train")} (' in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize('name', ['dr_grpo', 'dapo', 'gspo', 'rloo', 'reinforce'])
def test_the_recipes_of_the_family_pass(corpus, model, tmp_path, capsys, name):
    own = recipes.flatten(recipes.read_recipe(str(ROOT / 'configs' / f'{name}.py')))
    sizes = {
        'data.seq_len': 64,
        'generate.max_new_tokens': 4,
        'generate.batch_size': 8,
        'rl.rollouts': 64,
        'train.batch_size': 32,
    }
    keys = recipe(corpus) | own | sizes | {'rl.reward': 'math:1.0,length:0.1', 'data.format': 'prompt'}
    del keys['model.config'], keys['tokenizer.path']
    assert check(tmp_path, keys | {'model.path': str(model)}) == 0
    assert 'rl.reward=math:1.0,length:0.1' in capsys.readouterr().out.splitlines()[-1]


MISTAKES = {
    'keys of the family': (
        {'task': 'ppo', 'rl.reward': 'length', 'rl.ratio': 'sequence', **_LOOP},
        'rl.ratio=sequence',
    ),
    'a reward among several': ({'task': 'grpo', 'rl.reward': 'length:1,builtins:nothing:2', **_LOOP}, 'rl.reward'),
    'a pattern': ({'task': 'grpo', 'rl.reward': 'format', 'rl.format_pattern': '(', **_LOOP}, 'rl.format_pattern'),
    'data that is not there': ({'data.train': 'nowhere.jsonl'}, 'data.train=nowhere.jsonl'),
    'a template': ({'objective': 'sft', 'data.format': 'prompt', 'data.template': '{% if'}, 'data.template'),
    'a target': ({'method.name': 'lora', 'method.targets': 'q_porj'}, 'q_proj'),
    'a tokenizer': ({'tokenizer.path': './nothing'}, 'tokenizer.path'),
    'a reward function': ({'task': 'grpo', 'rl.reward': 'builtins:nothing', **_LOOP}, 'rl.reward'),
    'a batch': ({'train.batch_size': 3, 'train.accumulate': 2}, 'train.batch_size=3'),
    'a metric of samples': ({'eval.samples': 2, 'objective': 'reward'}, 'eval.samples=2'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_said_before_anything_is_loaded(corpus, model, tmp_path, capsys, name):
    keys, named = MISTAKES[name]
    keys = recipe(corpus) | {'model.path': str(model), 'tokenizer.path': ''} | keys
    del keys['model.config']
    assert check(tmp_path, keys) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_missing_tensor_is_said(corpus, model, tmp_path, capsys):
    folder = tmp_path / 'broken'
    shutil.copytree(model, folder)
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes().replace(b'layers.1.mlp.up_proj', b'layers.1.mlp.no_proj'))
    keys = recipe(corpus) | {'model.path': str(folder), 'tokenizer.path': ''}
    assert check(tmp_path, keys | {'model.config': {}}) == 2
    assert 'layers.1.mlp.up_proj.weight is missing' in capsys.readouterr().err


def test_stages_are_checked_as_far_as_their_inputs_are_there(corpus, tmp_path, capsys):
    keys = {f'pretrain.{key}': value for key, value in recipe(corpus).items()}
    keys |= {f'sft.{key}': value for key, value in recipe(corpus, 'sft').items() if 'model' not in key}
    keys |= {'stages': ('pretrain', 'sft'), 'sft.model.path': '@pretrain', 'sft.tokenizer.path': ''}
    assert check(tmp_path, keys) == 0
    assert 'the rest when pretrain is done' in capsys.readouterr().out
    assert check(tmp_path, keys | {'sft.data.train': 'nowhere.jsonl'}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'stage sft' in line
    assert 'nowhere.jsonl' in line


def test_a_large_model_needs_no_memory(corpus, tmp_path, capsys):
    fields = {'model_type': 'llama', 'vocab_size': 128256, 'hidden_size': 8192, 'intermediate_size': 28672}
    fields |= {'num_hidden_layers': 80, 'num_attention_heads': 64, 'num_key_value_heads': 8}
    folder = tmp_path / 'large'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({**fields, 'architectures': ['LlamaForCausalLM']}))
    tokenizers.load('bytes').save_pretrained(str(folder))
    built = models.build(models.read_config(fields))
    shapes = leaf_paths(built.shapes)
    specs = {}
    for path, tensor in built.tensors.items():
        shape = shapes[path].shape
        one = shape[tensor.stacked :]
        for name in tensor.names(shape):
            specs[name] = (np.dtype(np.float16), one[::-1] if tensor.transposed else one)
    with pytest.raises(ValueError, match='zip'):  # the header alone; a hole in the file stands for the weights
        write_file(folder / 'model.safetensors', specs, iter(()))
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    with open(folder / 'model.safetensors', 'r+b') as file:
        file.truncate((folder / 'model.safetensors').stat().st_size + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = recipe(corpus) | {'model.path': str(folder), 'tokenizer.path': '', 'method.name': 'lora', 'method.rank': 8}
    assert check(tmp_path, keys | {'model.config': {}}) == 0
    assert 'a llama of 70.7B' in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_a_workdir_of_something_else_is_refused(corpus, model, tmp_path, capsys):
    path = write_recipe(tmp_path / 'recipe.py', recipe(corpus))
    before = sorted(file.name for file in model.iterdir())
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(model), '--check']) == 2
    assert f'--workdir={model}' in capsys.readouterr().err
    assert sorted(file.name for file in model.iterdir()) == before
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.jsonl').write_text('{"step": 1}\n')
    status = main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run'), '--check'])
    assert [file.name for file in (tmp_path / 'run').iterdir()] == ['metrics.jsonl']
    assert status == 2
