"""Small recipes on small text, for the tests of the trainer as a whole."""

import pathlib
import random

import pytest
from runs import SENTENCE


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder with `train.jsonl` and `eval.jsonl`: sentences of a small vocabulary, many short documents."""
    import json

    folder = tmp_path_factory.mktemp('corpus')
    rng, vocabulary = random.Random(0), SENTENCE.split()
    for name, documents in (('train', 60), ('eval', 9)):
        lines = []
        for _ in range(documents):
            words = [rng.choice(vocabulary) for _ in range(rng.randint(5, 60))]
            record = {'text': ' '.join(words) + '.', 'label': 'early' if words[0] < 'j' else 'late'}
            question, answer = ' '.join(words[:3]), ' '.join(words[3:5])
            record |= {'prompt': f'{question}? ', 'completion': answer}
            record |= {'chosen': f'{answer} home', 'rejected': f'{answer} {rng.choice(vocabulary)} dog'}
            lines.append(json.dumps(record))
        (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> pathlib.Path:
    """A small model folder with a byte tokenizer."""
    import jax

    from jaxtune import models
    from jaxtune.data import tokenizer as tokenizers
    from jaxtune.models import hf

    folder = tmp_path_factory.mktemp('model') / 'small'
    fields = {'model_type': 'llama', 'vocab_size': 320, 'hidden_size': 32, 'intermediate_size': 64}
    fields |= {'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2}
    fields |= {'max_position_embeddings': 128, 'tie_word_embeddings': False}
    built = models.build(models.read_config(fields))
    hf.save(folder, built, jax.jit(built.init)(jax.random.key(0)))
    tokenizers.load('bytes').save_pretrained(str(folder))
    return folder
