"""Conversations where texts are expected: recognised by their fields, and trained as `sft` trains them."""

import json

import numpy as np
import pytest

from jaxtune.data import tokenizer as tokenizers
from jaxtune.recipe import recipes
from jaxtune.tasks import specs

TURNS = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
CHATS = {
    'messages': {'messages': TURNS},
    'sharegpt': {'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}]},
    'alpaca': {'instruction': 'Hi', 'output': 'Hello'},
    'prompt': {'prompt': 'Hi', 'completion': 'Hello'},
}


def rows(objective, file, cache, **changes):
    config = recipes.defaults()
    keys = {'objective': objective, 'data.train': str(file), 'data.seq_len': 256} | changes
    recipes.apply_overrides(config, keys)
    return specs.objective(config).dataset('train', tokenizers.load('bytes'), cache)


def write(folder, *records):
    file = folder / 'train.jsonl'
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return file


@pytest.mark.parametrize('name', CHATS)
@pytest.mark.parametrize('said', ['auto', 'its name'])
def test_they_become_the_rows_of_instruction_tuning(tmp_path, capsys, name, said):
    file = write(tmp_path, *[CHATS[name]] * 3)
    changes = {} if said == 'auto' else {'data.format': name}
    found = rows('causal_lm', file, tmp_path / 'a', **changes)
    assert f'data.train={file}: holds conversations, of which the answers are trained' in capsys.readouterr().out
    expected = rows('sft', file, tmp_path / 'b', **changes)
    assert len(found) == len(expected)
    for field, values in expected[0].items():
        np.testing.assert_array_equal(found[0][field], values)
    assert 0 < found[0]['loss_mask'].sum() < np.count_nonzero(found[0]['segment_ids'])


def test_texts_with_other_fields_beside_stay_texts(tmp_path, capsys):
    file = write(tmp_path, {'text': 'some text', 'messages': TURNS}, {'text': 'more', 'prompt': 'Hi'})
    found = rows('causal_lm', file, tmp_path / 'a')
    assert 'conversations' not in capsys.readouterr().out
    assert tokenizers.load('bytes').decode(found[0]['tokens'][:9]) == 'some text'


def test_some_are_held_out(tmp_path):
    chats = [{'messages': [TURNS[0], {'role': 'assistant', 'content': f'Hello {i}'}]} for i in range(40)]
    file = write(tmp_path, *chats)
    config = recipes.defaults()
    keys = {'data.train': str(file), 'data.eval': 'auto', 'data.seq_len': 256, 'data.eval_fraction': 0.2}
    recipes.apply_overrides(config, keys)
    objective, tokenizer = specs.objective(config), tokenizers.load('bytes')
    train, held_out = (objective.dataset(split, tokenizer, tmp_path / 'cache') for split in ('train', 'eval'))
    answers = []
    for part in (train, held_out):
        examples = [part.examples[i] for i in range(len(part.examples))]
        answers.append({tokenizer.decode(example.ids[example.assistant_mask > 0]) for example in examples})
    assert answers[0] | answers[1] == {f'Hello {i}<eos>' for i in range(40)}
    assert not answers[0] & answers[1]
    assert 2 <= len(answers[1]) <= 16


def test_weights_are_kept_where_there_are_some(tmp_path):
    weighed = [TURNS[0], TURNS[1] | {'weight': 0.5}]
    for name, turns, expected in (('plain', TURNS, {0.0, 1.0}), ('weighed', weighed, {0.0, 0.5})):
        (tmp_path / name).mkdir()
        file = write(tmp_path / name, {'messages': turns})
        for _ in range(2):  # made, and read again
            found = rows('sft', file, tmp_path / name)
            assert set(np.unique(found.examples[0].assistant_mask).tolist()) == expected
            assert set(np.unique(found[0]['loss_mask']).tolist()) == expected
            assert (found.examples.weights is None) == (name == 'plain')
            assert found.examples.assistant_mask.dtype == bool
