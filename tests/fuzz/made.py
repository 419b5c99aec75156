"""Tiny models, adapters, data and workdirs that cases are mutations of, made once by the program itself."""

import json
import pathlib
import random
import shutil

import forked

LLAMA = {
    'model_type': 'llama', 'vocab_size': 320, 'hidden_size': 8, 'intermediate_size': 16, 'num_hidden_layers': 2,
    'num_attention_heads': 2, 'num_key_value_heads': 1, 'max_position_embeddings': 128, 'tie_word_embeddings': False,
}  # fmt: skip
BERT = {
    'model_type': 'bert', 'vocab_size': 320, 'hidden_size': 8, 'intermediate_size': 16, 'num_hidden_layers': 1,
    'num_attention_heads': 2, 'max_position_embeddings': 128,
}  # fmt: skip
T5 = {
    'model_type': 't5', 'vocab_size': 448, 'd_model': 8, 'd_kv': 4, 'd_ff': 16, 'num_layers': 1, 'num_heads': 2,
    'decoder_start_token_id': 256, 'pad_token_id': 256, 'eos_token_id': 257,
}  # fmt: skip
_CONFIGS = {'masked_lm': BERT, 'classification': BERT, 'seq2seq': T5, 'span_corruption': T5}
_WORDS = ('the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog', 'seven', 'grey', 'geese', 'fly', 'home')
FIELDS = {
    'text': ('text',), 'pair': ('source', 'target'), 'alpaca': ('instruction', 'input', 'output'),
    'sharegpt': ('conversations',), 'messages': ('messages',), 'prompt': ('prompt', 'completion'),
    'preference': ('prompt', 'chosen', 'rejected'), 'class': ('text', 'label'),
}  # fmt: skip
_FORMATS = tuple(name for name in FIELDS if name not in ('text', 'class'))


class Source(str):
    """Python source of a value in a recipe."""


def records(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Records of a format."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        words = [rng.choice(_WORDS) for _ in range(rng.randint(3, 12))]
        text, answer = ' '.join(words), rng.choice(_WORDS)
        every = {
            'text': text, 'label': rng.choice(['a', 'b']), 'source': text[:12], 'target': answer,
            'prompt': text[:8] + '?', 'completion': answer, 'chosen': answer + ' home', 'rejected': answer + ' dog',
            'instruction': text[:8], 'output': answer, 'input': '',
            'messages': [{'role': 'user', 'content': text[:8]}, {'role': 'assistant', 'content': answer}],
            'conversations': [{'from': 'human', 'value': text[:8]}, {'from': 'gpt', 'value': answer}],
        }  # fmt: skip
        found.append({name: every[name] for name in FIELDS[kind]})
    return found


def recipe_text(keys: dict) -> str:
    """The recipe of flat keys."""
    lines = ['from ml_collections import ConfigDict', '', '', 'def get_config():']
    lines += ['    config = ConfigDict(type_safe=False)']
    there = set()
    for key, value in keys.items():
        *parents, last = key.split('.')
        for depth in range(1, len(parents) + 1):
            node = '.'.join(parents[:depth])
            if node not in there:
                lines.append(f'    config.{node} = ConfigDict(type_safe=False)')
                there.add(node)
        text = str(value) if isinstance(value, Source) else repr(value)
        text = f'ConfigDict({text}, type_safe=False)' if isinstance(value, dict) else text
        lines.append(f'    {".".join(["config", *parents])}[{last!r}] = {text}')
    return '\n'.join([*lines, '    return config', ''])


class Made:
    """A folder with everything, each thing made when it is first asked for.

    Args:
      folder: made anew where the program is a newer one.

    Attributes:
      data: `KIND.jsonl` and `KIND.eval.jsonl` of every kind of record.
    """

    def __init__(self, folder: pathlib.Path = forked.MADE):
        self.folder, self.data = folder, folder / 'data'
        mark, newest = folder / 'program', str(max(file.stat().st_mtime_ns for file in forked.PROGRAM.rglob('*.py')))
        if not mark.is_file() or mark.read_text() != newest:
            shutil.rmtree(folder, ignore_errors=True)
            self.data.mkdir(parents=True)
            for kind in FIELDS:
                for name, count, seed in ((kind, 24, 0), (f'{kind}.eval', 6, 1)):
                    rows = ''.join(json.dumps(row) + '\n' for row in records(kind, count, seed))
                    (self.data / f'{name}.jsonl').write_text(rows)
            mark.write_text(newest)

    def model(self, name: str) -> pathlib.Path:
        """The folder of a model: `llama`, `bert`, `t5` or `reward`."""
        place = self.folder / name
        if not (place / 'config.json').is_file():
            forked.call(lambda: _save_model(place, *_MODELS[name]))
        return place

    def run(self, name: str) -> pathlib.Path:
        """The workdir of a finished run: a method's, `kept` (with checkpoints), or `prepared`."""
        place = self.folder / name
        if not (place / 'run' / 'result.json').is_file():
            kept = {'data.eval': str(self.data / 'text.eval.jsonl'), 'eval.every': 1, 'checkpoint.every': 1}
            keys = self.base() | kept | {'checkpoint.keep': 3} if name == 'kept' else self.task(_RUNS.get(name, name))
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            (place / 'recipe.py').write_text(recipe_text(keys))
            ended = forked.run(['--config', place / 'recipe.py', '--workdir', place / 'run'], place, timeout=240)
            if ended.status:
                raise RuntimeError(f'cannot make {name}: exit {ended.status}: {ended.stderr[-3000:]}')
        return place / 'run'

    def base(self, kind: str = 'text', objective: str = 'causal_lm') -> dict:
        """A good recipe of an objective on records of a kind."""
        keys = {
            'objective': objective, 'tokenizer.path': 'bytes', 'model.config': dict(_CONFIGS.get(objective, LLAMA)),
            'data.seq_len': 96, 'data.train': str(self.data / f'{kind}.jsonl'), 'train.steps': 2,
            'train.batch_size': 2, 'train.accumulate': 1, 'log.every': 1,
        }  # fmt: skip
        return keys | ({'data.format': kind} if kind in _FORMATS else {})

    def of(self, name: str) -> dict:
        """The keys that take one of the models."""
        return {'model.path': str(self.model(name)), 'tokenizer.path': '', 'model.config': {}}

    def task(self, name: str) -> dict:
        """A good recipe of a task, objective or method: one of `TASKS`."""
        data = self.data
        if name in METHODS:
            return self.base() | self.of('llama') | METHODS[name]
        if name in ('sft', 'reward', 'dpo'):
            return self.base('messages' if name == 'sft' else 'preference', name) | self.of('llama')
        if name in ('ppo', 'grpo'):
            loop = {'rl.rollouts': 4, 'rl.epochs': 1, 'rl.group': 2, 'train.batch_size': 4, 'generate.batch_size': 4}
            loop |= {'rl.reward': str(self.model('reward')), 'generate.max_new_tokens': 4}
            return self.base('prompt') | self.of('llama') | loop | {'task': name}
        if name in ('evaluate', 'export'):
            return self.base() | self.of('llama') | {'task': name, 'data.eval': str(data / 'text.eval.jsonl')}
        if name == 'generate':
            short = {'generate.max_new_tokens': 4, 'generate.prompts': 2, 'data.format': 'prompt'}
            short |= {'data.eval': str(data / 'prompt.eval.jsonl')}
            return self.base() | self.of('llama') | short | {'task': name}
        if name == 'prepare':
            return {'task': name, 'data.train': str(data / 'text.jsonl'), 'tokenizer.path': 'bytes'}
        if name == 'phases':
            phases = {'data.sources': {'a': {'path': str(data / 'text.jsonl'), 'kind': 'text'}}, 'data.workers': 1}
            return phases | {'task': 'prepare', 'tokenizer.path': 'bytes', 'data.steps.dedup.near': 0.8}
        return {
            'train': self.base() | {'data.eval': str(data / 'text.eval.jsonl')},
            'masked_lm': self.base('text', 'masked_lm'),
            'span': self.base('text', 'span_corruption'),
            'seq2seq': self.base('pair', 'seq2seq') | {'data.target_len': 8},
            'classification': self.base('class', 'classification'),
        }[name]


METHODS = {
    'lora': {'method.name': 'lora', 'method.rank': 2},
    'qlora': {'method.name': 'qlora', 'method.rank': 2, 'method.block_size': 16},
    'adapter': {'method.name': 'adapter', 'method.bottleneck': 2},
    'prompt': {'method.name': 'prompt', 'method.virtual_tokens': 2},
    'prefix': {'method.name': 'prompt', 'method.virtual_tokens': 2, 'method.prefix': True},
}
TASKS = (
    'train', 'sft', 'reward', 'dpo', 'masked_lm', 'span', 'seq2seq', 'classification', 'lora', 'qlora', 'adapter',
    'prompt', 'prefix', 'ppo', 'grpo', 'evaluate', 'generate', 'export', 'prepare', 'phases',
)  # fmt: skip
_RUNS = {'prepared': 'prepare'}
_REWARD = LLAMA | {'num_labels': 1, 'id2label': {'0': 'reward'}, 'label2id': {'reward': 0}, 'pad_token_id': 256}
_MODELS = {
    'llama': (LLAMA, {}),
    'bert': (BERT, {'head': 'classification', 'labels': 2}),
    't5': (T5, {}),
    'reward': (_REWARD, {'head': 'reward', 'labels': 1}),
}


def _save_model(place: pathlib.Path, fields: dict, head: dict) -> None:
    """Writes a model as it is at the start of training, with a byte tokenizer."""
    import jax

    from jaxtune import models
    from jaxtune.data import tokenizer as tokenizers
    from jaxtune.models import hf

    labels = {'id2label': {'0': 'a', '1': 'b'}, 'label2id': {'a': 0, 'b': 1}} if head.get('labels') == 2 else {}
    model = models.build(models.read_config(fields | labels), **head)
    hf.save(place, model, jax.jit(model.init)(jax.random.key(0)))
    tokenizers.load('bytes').save_pretrained(str(place))
