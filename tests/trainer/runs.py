"""Running a recipe inside a test: on a mesh of this process, or as a command of its own."""

import json
import pathlib

import jax
from child import Child
from ml_collections import ConfigDict

from jaxtune import models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.models import hf
from jaxtune.models.safetensors import read_header
from jaxtune.parallel import AXES, make_mesh
from jaxtune.recipe import recipes
from jaxtune.recipe.flags import Command
from jaxtune.tasks.train import run_on

SENTENCE = 'the quick brown fox jumps over a lazy dog while seven grey geese fly home to their warm nest'

_BERT = {
    'model_type': 'bert',
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'max_position_embeddings': 128,
}
_LLAMA = {
    'model_type': 'llama',
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 128,
    'tie_word_embeddings': False,
}
_T5 = {'model_type': 't5', 'd_model': 32, 'd_kv': 8, 'd_ff': 64, 'num_layers': 2, 'num_heads': 4}

# What each objective trains here: a new one joins every test of the trainer by a line.
MODELS = {
    'causal_lm': _LLAMA,
    'masked_lm': _BERT,
    'classification': _BERT,
    'span_corruption': _T5,
    'seq2seq': _T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
    'sft': _LLAMA,
    'reward': _LLAMA,
    'dpo': _LLAMA,
    'distill': _LLAMA,
}
# The keys it needs beside those that all have.
KEYS = {
    # T5's scores are not divided by the root of their width: larger steps let rounding grow past the bounds.
    'span_corruption': {'optimizer.lr': 3e-3},
    'sft': {'data.format': 'prompt'},
    # What both answers share has gradients of rounding errors alone, which Adam must not scale up.
    'reward': {'optimizer.eps': 1e-3, 'optimizer.lr': 1e-3},
    'seq2seq': {'data.source_key': 'text', 'data.target_key': 'text', 'data.target_len': 48, 'optimizer.lr': 5e-3},
}
OBJECTIVES = tuple(MODELS)


def teacher(folder: pathlib.Path, name: str = 'teacher', **fields) -> pathlib.Path:
    """A model folder in a folder, made once: of another family than the students, wider, with their tokenizer."""
    if not (folder / name / 'model.safetensors').is_file():
        fields = {'model_type': 'qwen3', 'hidden_size': 48, 'head_dim': 16, 'num_hidden_layers': 1} | fields
        model = models.build(models.read_config({**_LLAMA, 'vocab_size': 320, 'initializer_range': 0.3, **fields}))
        hf.save(folder / name, model, jax.jit(model.init)(jax.random.key(1)))
        tokenizers.load('bytes').save_pretrained(str(folder / name))
    return folder / name


def recipe(corpus: pathlib.Path, objective: str = 'causal_lm', **changes) -> dict:
    """A small run's keys, flat; `changes` have `__` for the dot."""
    return {
        'objective': objective,
        'tokenizer.path': 'bytes',
        'model.config': MODELS[objective],
        'data.train': str(corpus / 'train.jsonl'),
        'data.eval': str(corpus / 'eval.jsonl'),
        'data.seq_len': 64,
        'train.steps': 20,
        'train.batch_size': 16,
        'train.accumulate': 1,
        'optimizer.lr': 1e-2,
        # A gradient that is rounding errors alone must not become a whole step, which no two meshes would share.
        'optimizer.eps': 1e-4,
        'optimizer.warmup_steps': 3,
        'log.every': 1,
        **KEYS.get(objective, {}),
        **({'distill.teacher': str(teacher(corpus))} if objective == 'distill' else {}),
        **{name.replace('__', '.'): value for name, value in changes.items()},
    }


def full_config(keys: dict) -> ConfigDict:
    config = recipes.defaults()
    recipes.apply_overrides(config, keys)
    return config


def train(keys: dict, workdir: pathlib.Path, sizes=(1, 1, 1, 1)) -> dict:
    """Trains on a mesh of `[data, fsdp, tensor, sequence]` sizes; returns `result.json`'s content."""
    config = full_config(keys)
    count = 1
    for size in sizes:
        count *= size
    mesh = make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[:count])
    command = Command('recipe.py', workdir, False, {'': config}, ('jaxtune',))
    workdir.mkdir(parents=True, exist_ok=True)
    return run_on(mesh, config, workdir, command)


def metrics(workdir: pathlib.Path, name: str) -> list[float]:
    """All values of a metric, in order."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def write_recipe(path: pathlib.Path, keys: dict) -> pathlib.Path:
    """A recipe file of flat keys."""
    lines = ['from ml_collections import ConfigDict', '', '', 'def get_config():', '    config = ConfigDict()']
    made = set()
    for key, value in keys.items():
        *parents, _ = key.split('.')
        for depth in range(1, len(parents) + 1):
            node = '.'.join(parents[:depth])
            if node not in made:
                lines.append(f'    config.{node} = ConfigDict()')
                made.add(node)
        text = f'ConfigDict({value!r})' if isinstance(value, dict) else repr(value)
        lines.append(f'    config.{key} = {text}')
    path.write_text('\n'.join([*lines, '    return config', '']))
    return path


def start(recipe_path: pathlib.Path, workdir: pathlib.Path, *flags: str, devices: int = 1) -> Child:
    """The command, in a process of its own."""
    words = ['--config', recipe_path, '--workdir', workdir, *flags]
    return Child(words, recipe_path.parent, devices)


def exported(workdir: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every exported tensor."""
    entries = read_header(workdir / 'export' / 'model.safetensors')
    return {name: entry.read().tobytes() for name, entry in entries.items()}
