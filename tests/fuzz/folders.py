"""Cases of damaged model folders and adapters."""

import json
import os
import pathlib
import random
import shutil

import hostile
import mutate
from case import Case
from made import Made

Rng, Path = random.Random, pathlib.Path

_TASKS = {
    'llama': ('export', 'export', 'generate', 'evaluate', 'train', 'sft', 'lora', 'qlora'),
    'bert': ('export', 'classification', 'masked_lm'),
    't5': ('export', 'seq2seq', 'span'),
    'reward': ('export', 'reward', 'ppo'),
}
_HEADS = ('score', 'head', 'classifier', 'pooler')  # which a folder may lack


def model(made: Made, rng: Rng, folder: Path) -> Case:
    """A model folder is damaged."""
    name = rng.choice(('llama', 'llama', 'llama', 'bert', 't5', 'reward'))
    place, task = folder / 'model é', rng.choice(_TASKS[name])
    shutil.copytree(made.model(name), place)
    keys = made.task(task)
    if task == 'ppo':
        keys['rl.reward'] = str(place)
    else:
        keys |= {'model.path': str(place), 'model.config': {}, 'tokenizer.path': ''}
    hurt = rng.choice((_fields, _fields, _header, _header, _bytes, _index, _tokenizer, _tokenizer, _odd))
    said, must_fail = hurt(rng, place)
    culprits = (place.name, 'tokenizer', 'model.path', 'rl.reward', 'data.seq_len')
    return Case('model', f'{task} of {name}: {said}', keys, [], culprits, must_fail, full=rng.random() < 0.1)


def _fields(rng: Rng, place: Path) -> tuple[str, str]:
    names = ('config.json', 'config.json', 'config.json', 'generation_config.json', 'tokenizer_config.json')
    file = place / rng.choice(names)
    value, said = mutate.json_value(rng, json.loads(file.read_text()), rng.choice((1, 1, 2)))
    file.write_text(mutate.dumps(value))
    return f'{file.name}: {said}', ''


_HEADERS = (
    'value', 'value', 'missing', 'renamed', 'extra', 'dtype', 'shape', 'offsets', 'overlap', 'deep', 'length', 'twice',
)  # fmt: skip
_DTYPES = ('F64', 'F16', 'BF16', 'I32', 'U8', 'F8_E4M3', 'BOOL', 'F4', 'f32', '', None, 3, 'C64')
_SHAPES = ([0], [-1, -1], [10**30], [2.5], ['x'], '12', None, [[1]], [True], [1e400], [])
_OFFSETS = ([0, 0], [-8, 8], [10**12, 10**12 + 4], [8, 0], [0.5, 4.5], ['0', '4'], None, [0], [0, 4, 8], [1e400, 4])


def _header(rng: Rng, place: Path, file: str = 'model.safetensors') -> tuple[str, str]:
    """The header of the weights is another one, or does not fit them."""
    weights = place / file
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != '__metadata__']
    name, must_fail = rng.choice(names), ''
    needed = '' if any(part in name for part in _HEADS) else f'{name} is missing'
    how = rng.choice(_HEADERS)
    if how == 'value':
        header, how = mutate.json_value(rng, header, 1)
    elif how == 'missing':
        del header[name]
        must_fail = needed
    elif how == 'renamed':
        header[name + 'x'] = header.pop(name)
        must_fail = needed
    elif how == 'extra':
        header['model.layers.7.x'] = dict(header[name])
    elif how == 'dtype':
        header[name]['dtype'] = rng.choice(_DTYPES)
    elif how == 'shape':
        header[name]['shape'] = rng.choice((*_SHAPES, header[name]['shape'][::-1]))
    elif how == 'offsets':
        header[name]['data_offsets'] = rng.choice(_OFFSETS)
    elif how == 'overlap':
        header[name]['data_offsets'] = header[names[0]]['data_offsets']
    text = mutate.dumps(header).encode()
    if how == 'deep':
        text = b'[' * 50_000 + b']' * 50_000
    elif how == 'twice':
        text = text[:-1] + b', ' + text[1:]
    length = len(text)
    if how == 'length':
        length = rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**63, 2**64 - 1, 10**8, len(data)))
        must_fail = 'the length of the header is wrong'
    weights.write_bytes(length.to_bytes(8, 'little') + text + data[8 + size :])
    return f'weights {how} {name}', must_fail


def _bytes(rng: Rng, place: Path) -> tuple[str, str]:
    names = ('config.json', 'model.safetensors', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json')
    return _hurt(rng, place / rng.choice(names)), ''


def _hurt(rng: Rng, file: Path) -> str:
    data, said = mutate.raw(rng, file.read_bytes())
    file.write_bytes(data)
    return f'{file.name} {said}'


def _index(rng: Rng, place: Path) -> tuple[str, str]:
    """The weights have an index, and it is damaged."""
    data = (place / 'model.safetensors').read_bytes()
    (place / 'model.safetensors').rename(place / 'model-00001-of-00001.safetensors')
    names = [name for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')]) if name != '__metadata__']
    index = {'metadata': {'total_size': 1}, 'weight_map': dict.fromkeys(names, 'model-00001-of-00001.safetensors')}
    odd = {
        'outside': '../../../../../../etc/passwd', 'absolute': '/etc/passwd', 'missing': 'gone.safetensors',
        'number': 7, 'list': ['x'], 'null': None, 'folder': '.', 'loop': 'loop.safetensors', 'pipe': 'pipe.safetensors',
        'NUL': 'a\0b', 'long': 'x' * 5000,
    }  # fmt: skip
    how, must_fail = rng.choice((*odd, 'numbers', 'empty', 'value', 'value')), ''
    if how in odd:
        index['weight_map'][rng.choice(names)] = odd[how]
        must_fail = f'a file of the index is {how}'
    elif how == 'value':
        index, how = mutate.json_value(rng, index, 1)
    else:
        index['weight_map'] = dict.fromkeys(names, 7) if how == 'numbers' else {}
    (place / 'loop.safetensors').symlink_to('loop.safetensors')
    os.mkfifo(place / 'pipe.safetensors')
    (place / 'model.safetensors.index.json').write_text(mutate.dumps(index))
    return f'index: {how}', must_fail


_TOKENIZERS = (
    'value', 'value', 'value', 'no words', 'beyond', 'pattern', 'gone', 'template', 'template', 'config', 'code',
    'class',
)  # fmt: skip
_CLASSES = (None, 5, '', 'Evil', 'os.system', 'BertTokenizer', 'LlamaTokenizer', 'T5TokenizerFast', [])
_TEMPLATES = (
    *hostile.TEMPLATES, 5, [], {}, True, [{'name': 'x', 'template': 1}], {'default': 5},
    [{'name': 'default', 'template': 'x'}],
)  # fmt: skip


def _tokenizer(rng: Rng, place: Path) -> tuple[str, str]:
    how = rng.choice(_TOKENIZERS)
    file, settings = place / 'tokenizer.json', place / 'tokenizer_config.json'
    value, config = json.loads(file.read_text()), json.loads(settings.read_text())
    if how == 'value':
        value, how = mutate.json_value(rng, value, rng.choice((1, 2)))
    elif how == 'no words':
        value['model']['vocab'], value['added_tokens'] = {}, []
    elif how == 'beyond':
        far = {'id': rng.choice((1000, 2**31, 2**32 - 1)), 'content': '<far>'}
        value['added_tokens'].append({**value['added_tokens'][0], **far})
    elif how == 'pattern':
        split = {'type': 'Split', 'behavior': 'Isolated', 'invert': False}
        pattern = rng.choice(('(', '(a+)+$', '(?=', '\\p{Z', '', 'a{99999}', '(\\w+\\s*)+x', '(?<=a'))
        value['pre_tokenizer'] = split | {'pattern': {'Regex': pattern}}
    elif how == 'template':
        config['chat_template'] = rng.choice(_TEMPLATES)
        how = f'chat template {str(config["chat_template"])[:60]}'
    elif how == 'config':
        config, how = mutate.json_value(rng, config, 2)
    elif how == 'code':
        config['auto_map'] = {'AutoTokenizer': ['evil.Evil', None]}
        (place / 'evil.py').write_text(f'open({str(place / "RAN")!r}, "w")\nclass Evil: pass\n')
    elif how == 'class':
        config['tokenizer_class'] = rng.choice(_CLASSES)
    file.write_text(mutate.dumps(value))
    settings.write_text(mutate.dumps(config))
    if how == 'gone':
        file.unlink()
    return f'tokenizer: {how}', ''


def _odd(rng: Rng, place: Path) -> tuple[str, str]:
    """Files that are none, or that would run code."""
    how = rng.choice(('pickle', 'pickle too', 'code', 'folder', 'loop', 'pipe', 'empty', 'adapter', 'jinja'))
    weights, config, must_fail = place / 'model.safetensors', place / 'config.json', ''
    if how in ('pickle', 'pickle too'):
        (place / 'pytorch_model.bin').write_bytes(b"cos\nsystem\n(S'touch RAN'\ntR.")
    if how == 'pickle':
        weights.unlink()
        must_fail = 'only pickled weights'
    elif how == 'code':
        fields = json.loads(config.read_text()) | {'auto_map': {'AutoConfig': 'evil.Evil', 'AutoModel': 'evil.Evil'}}
        config.write_text(json.dumps(fields))
        (place / 'evil.py').write_text(f'open({str(place / "RAN")!r}, "w")\nclass Evil: pass\n')
    elif how in ('folder', 'loop'):
        weights.unlink()
        weights.mkdir() if how == 'folder' else weights.symlink_to(weights)
        must_fail = f'the weights are a {how}'
    elif how == 'pipe':
        config.unlink()
        os.mkfifo(config)
        must_fail = 'config.json is a pipe'
    elif how == 'empty':
        shutil.rmtree(place)
        place.mkdir()
        must_fail = 'the folder is empty'
    elif how == 'adapter':
        (place / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    elif how == 'jinja':
        text = rng.choice((b'\xff\xfe', b'{{', rng.choice(hostile.TEMPLATES).encode()))
        (place / 'chat_template.jinja').write_bytes(text)
    return how, must_fail


def adapter(made: Made, rng: Rng, folder: Path) -> Case:
    """An adapter is damaged."""
    kind, place = rng.choice(('lora', 'lora', 'adapter', 'prompt', 'prefix')), folder / 'adapter é'
    shutil.copytree(made.run(kind) / 'adapter', place)
    task = rng.choice(('generate', 'evaluate', 'export') if kind == 'lora' else ('generate', 'evaluate'))
    keys = made.task(task) | ({'method.path': str(place)} if rng.random() < 0.6 else {'model.path': str(place)})
    how, must_fail = rng.random(), ''
    if how < 0.6:
        file = place / 'adapter_config.json'
        value, said = mutate.json_value(rng, json.loads(file.read_text()), rng.choice((1, 2)))
        file.write_text(mutate.dumps(value))
    elif how < 0.7:
        said = _hurt(rng, place / 'adapter_config.json')
    elif how < 0.8:
        said = _hurt(rng, place / 'adapter_model.safetensors')
    else:
        said, must_fail = _header(rng, place, 'adapter_model.safetensors')
        must_fail = '' if 'missing' in must_fail and kind != 'lora' else must_fail
    culprits = (place.name, 'model.path', 'method.path')
    return Case('adapter', f'{task} {kind}: {said}', keys, [], culprits, must_fail, full=rng.random() < 0.1)
