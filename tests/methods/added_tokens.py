"""Models without room for further tokens, texts that hold some, and what is asked of runs that add them."""

import json
import pathlib
import random
import sys

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'trainer'))

from runs import SENTENCE, full_config, recipe

from jaxtune.data import tokenizer as tokenizers
from jaxtune.models.safetensors import read_header
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe.flags import Command
from jaxtune.tasks import specs

NAMES = tuple(f'<tool_{letter}>' for letter in 'abcdefgh')
ROWS = 259  # of the byte tokenizer, and of the models: no room for another
_BERT = {
    'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': 128,
}  # fmt: skip
_LLAMA = _BERT | {'num_key_value_heads': 2}
_T5 = {'d_model': 32, 'd_kv': 8, 'd_ff': 64, 'num_layers': 2, 'num_heads': 4, 'decoder_start_token_id': 0}
# A model's type and fields, its class, and the objective that trains it here.
KINDS = {
    'tied': ('llama', _LLAMA | {'tie_word_embeddings': True}, 'AutoModelForCausalLM', 'causal_lm'),
    'untied': ('llama', _LLAMA | {'tie_word_embeddings': False}, 'AutoModelForCausalLM', 'causal_lm'),
    'padded': ('llama', _LLAMA | {'vocab_size': 320, 'tie_word_embeddings': True}, 'AutoModelForCausalLM', 'causal_lm'),
    'bert': ('bert', _BERT, 'AutoModelForMaskedLM', 'masked_lm'),
    'padded bert': ('bert', _BERT | {'vocab_size': 320}, 'AutoModelForMaskedLM', 'masked_lm'),
    't5': ('t5', _T5, 'AutoModelForSeq2SeqLM', 'seq2seq'),
}
METHODS = {
    'lora': {'method.name': 'lora', 'method.rank': 4},
    'qlora': {'method.name': 'qlora', 'method.rank': 4},
    'adapter': {'method.name': 'adapter', 'method.bottleneck': 8},
    'full': {'method.name': 'full'},
}


def make_base(folder, kind):
    """A random model of PyTorch's, saved with the byte tokenizer."""
    torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
    model_type, fields, auto, _ = KINDS[kind]
    fields = {'vocab_size': ROWS, 'pad_token_id': 256, 'eos_token_id': 257, 'bos_token_id': None} | fields
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + ('norm' in name.lower()) * parameter)
    model.save_pretrained(folder)
    tokenizers.load('bytes').save_pretrained(folder)


def write_texts(folder):
    """Texts that hold the new tokens, to train on and held out."""
    rng, vocabulary = random.Random(0), [*SENTENCE.split(), *NAMES]
    for name, documents in (('train', 40), ('eval', 6)):
        texts = [' '.join(rng.choice(vocabulary) for _ in range(12)) for _ in range(documents)]
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))


def keys_of(bases, corpus, kind, method, **changes):
    objective = KINDS[kind][3]
    keys = recipe(corpus, objective, train__steps=8, checkpoint__every=3, **METHODS[method] | changes)
    del keys['model.config'], keys['tokenizer.path']
    return keys | {'model.path': str(bases(kind)), 'tokenizer.add': tuple((name, '') for name in NAMES)}


def tensors(folder):
    return {name: entry.read() for name, entry in read_header(next(folder.glob('*.safetensors'))).items()}


def bundle_of(task='generate', **keys):
    config = full_config({'task': task, **keys})
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return load_model(specs.model_spec(config), mesh)


def ids_of(tokenizer):
    text = f'the {NAMES[0]} quick {NAMES[7]}{NAMES[3]} brown fox {NAMES[5]}'
    return np.asarray([tokenizer(text).input_ids], np.int32)


def logits(bundle, ids):
    batch = {'tokens': ids} | ({'decoder_tokens': ids} if bundle.model.kind == 'encdec' else {})
    return np.asarray(bundle.model.logits(bundle.params, bundle.model.apply(bundle.params, batch).hidden))


def rows_of(kind):
    """How many a trained model has."""
    return 320 if 'padded' in kind else ROWS + len(NAMES)


def by_end(values, name):
    """The tensor of a folder that another calls by a longer or shorter name."""
    return next(value for other, value in values.items() if other.split('.')[-2:] == name.split('.')[-2:])


def run(task, workdir, **keys):
    config = full_config({'task': task.__name__.rsplit('.', 1)[-1], 'data.seq_len': 64, 'mesh.data': 8, **keys})
    workdir.mkdir(parents=True, exist_ok=True)
    return task.run(config, workdir, Command('recipe.py', workdir, False, {'': config}, ('jaxtune',)))


def torch_logits(model, ids):
    import torch  # slow to import

    ids = torch.from_numpy(ids).long()
    further = {'decoder_input_ids': ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **further).logits.numpy()


def torch_base(folder, kind, rows=None):
    import transformers  # slow to import

    model = getattr(transformers, KINDS[kind][2]).from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(rows)
    return model
