"""Classifiers: labels, their way into the exported folder, and the same losses as transformers' PyTorch."""

import json

import numpy as np
import pytest
from runs import full_config, metrics, recipe, train

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.objectives.classification import Labels
from jaxtune.pretrained.load import open_model
from jaxtune.recipe.flags import Command
from jaxtune.tasks import evaluate, export, specs

BYTES = tokenizers.load('bytes')
STEPS, LR = 20, 2e-3


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return str(path)


def config_of(train='', **keys):
    return full_config({'objective': 'classification', 'data.train': train, 'data.seq_len': 16, **keys})


def rows(config, split='train'):
    return specs.objective(config).dataset(split, BYTES, None)


def command(workdir, config):
    return Command('recipe.py', workdir, False, {'': config}, ('jaxtune',))


def test_rows_of_texts_and_of_pairs(tmp_path):
    texts = [{'text': 'a longer text than sixteen bytes', 'label': 'b'}, {'text': 'ab', 'label': 'a'}]
    config = config_of(write(tmp_path / 'texts.jsonl', texts))
    first, second = rows(config)
    assert bytes(first['tokens'].tolist()) == b'a longer text th'
    assert second['tokens'].tolist() == [97, 98] + 14 * [0]
    assert second['segment_ids'].tolist() == [1, 1] + 14 * [0]
    assert second['positions'].tolist() == [0, 1] + 14 * [0]
    assert (first['labels'], second['labels']) == (1, 0)
    for name, field in specs.objective(config).batch_spec().items():
        assert (first[name].shape, first[name].dtype) == (field.shape, field.dtype)

    pairs = [{'text1': 'ab', 'text2': 'cde', 'label': 1}, {'text1': 'x', 'text2': 'y', 'label': 0}]
    first, _ = rows(config_of(write(tmp_path / 'pairs.jsonl', pairs)))
    assert bytes(first['tokens'][:5].tolist()) == b'abcde'
    assert first['token_types'].tolist() == [0, 0, 1, 1, 1] + 11 * [0]


def test_labels_are_sorted_names_or_numbers(tmp_path):
    names = write(tmp_path / 'names.jsonl', [{'text': 'x', 'label': name} for name in ('b', 'a', 'c', 'a')])
    assert Labels.of(specs.data_spec(config_of(names))).names == ('a', 'b', 'c')
    numbers = write(tmp_path / 'numbers.jsonl', [{'text': 'x', 'label': number} for number in (10, 2, 0)])
    assert Labels.of(specs.data_spec(config_of(numbers))).names == ('0', '2', '10')
    (tmp_path / 'model').mkdir()
    folder = tmp_path / 'model' / 'config.json'
    folder.write_text(json.dumps({'model_type': 'bert', 'id2label': {'0': 'c', '1': 'b', '10': 'z', '2': 'a'}}))
    known = {'model.path': str(tmp_path / 'model')}
    assert Labels.of(specs.data_spec(config_of(names, **known))).names == ('c', 'b', 'a', 'z')
    assert Labels.of(specs.data_spec(config_of(**known))).names == ('c', 'b', 'a', 'z')
    assert Labels.of(specs.data_spec(config_of(numbers, **known))).names == ('0', '2', '10')
    few = write(tmp_path / 'few.jsonl', [{'text': 'x', 'label': number} for number in (3, 1)])
    labels = Labels.of(specs.data_spec(config_of(few, **known)))
    assert [labels.number(number, 'here') for number in (0, 3)] == [0, 3]


@pytest.mark.parametrize(
    ('records', 'words'),
    [
        ([{'text': 'x', 'label': 'a'}, {'text': 'x'}], r'data\.jsonl:2: expected the field .label.'),
        ([{'text': 'x', 'label': 'a'}, {'text': 'x', 'label': 1.5}], r'data\.jsonl:2: expected a text or an integer'),
        ([{'text1': 'x', 'label': 'a'}], r'data\.jsonl:1: expected the field .text2.'),
        ([{'text': 'x', 'label': 'a'}, {'text1': 'x', 'text2': '', 'label': 'a'}], r'data\.jsonl:2: .*one text in'),
        ([{'text': 'x', 'label': 'a'}, {'text': '', 'label': 'a'}], r'data\.jsonl:2: expected a text of at least one'),
    ],
)
def test_bad_records_are_refused_by_line(records, words, tmp_path):
    with pytest.raises(UserError, match=words):
        rows(config_of(write(tmp_path / 'data.jsonl', records)))


def test_a_held_out_label_that_training_lacks_is_refused(tmp_path):
    training = write(tmp_path / 'train.jsonl', [{'text': 'x', 'label': 'a'}, {'text': 'y', 'label': 'b'}])
    held_out = write(tmp_path / 'eval.jsonl', [{'text': 'x', 'label': 'a'}, {'text': 'y', 'label': 'c'}])
    with pytest.raises(UserError, match=r"eval\.jsonl:2: label 'c': expected one of the 2 labels a, b"):
        rows(config_of(training, **{'data.eval': held_out}), 'eval')


def test_the_export_carries_the_labels_and_is_scored_and_exported_again(corpus, tmp_path):
    keys = recipe(corpus, 'classification', train__steps=3)
    trained = train(keys, tmp_path / 'run')
    described = json.loads((tmp_path / 'run' / 'export' / 'config.json').read_text())
    assert described['architectures'] == ['BertForSequenceClassification']
    assert described['id2label'] == {'0': 'early', '1': 'late'}
    assert described['label2id'] == {'early': 0, 'late': 1}

    own = {'model.path': str(tmp_path / 'run'), 'data.seq_len': 64}
    scored = {**own, 'task': 'evaluate', 'objective': 'classification', 'data.eval': keys['data.eval']}
    (tmp_path / 'scored').mkdir()
    again = evaluate.run(full_config(scored), tmp_path / 'scored', command(tmp_path, full_config(scored)))
    for name in ('eval/loss', 'eval/accuracy', 'eval/tokens'):
        assert again['metrics'][name] == pytest.approx(trained['metrics'][name], rel=1e-5)
    assert again['metrics']['eval/tokens'] == 9

    copied = full_config({**own, 'task': 'export'})
    (tmp_path / 'copy').mkdir()
    export.run(copied, tmp_path / 'copy', command(tmp_path, copied))
    for name in ('config.json', 'model.safetensors'):
        first, second = (tmp_path / folder / 'export' / name for folder in ('run', 'copy'))
        assert first.read_bytes() == second.read_bytes()


def test_objectives_refuse_models_that_do_not_suit_them():
    for objective, model_type in (('causal_lm', 'bert'), ('masked_lm', 'gpt2'), ('classification', 'llama')):
        config = full_config({'objective': objective, 'model.config': {'model_type': model_type}})
        with pytest.raises(UserError, match=rf'objective={objective}: does not suit model_type=.{model_type}.'):
            open_model(specs.model_spec(config), BYTES)


def test_losses_equal_transformers_in_pytorch(corpus, tmp_path):
    torch = pytest.importorskip('torch')
    from transformers import BertConfig, BertForSequenceClassification

    shape = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    still = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=320, **shape, **still, id2label={0: 'early', 1: 'late'}, label2id={'early': 0, 'late': 1})
    )
    model.save_pretrained(tmp_path / 'model')
    keys = recipe(corpus, 'classification', optimizer__lr=LR, optimizer__eps=1e-8, optimizer__schedule='linear')
    keys |= {'model.config': {}, 'model.path': str(tmp_path / 'model'), 'train.steps': STEPS}
    train(keys, tmp_path / 'run')

    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{'params': matrices, 'weight_decay': 0.01}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    warmup = keys['optimizer.warmup_steps']
    config, losses = full_config(keys), []
    loader = Loader(rows(config), 16, config.seed)
    for t in range(STEPS):
        batch = {name: torch.tensor(value) for name, value in loader.rows(t, 0, 16).items()}
        for group in optimizer.param_groups:
            group['lr'] = LR * min((t + 1) / warmup, 1 - (t - warmup) / (STEPS - warmup))
        loss = model(
            batch['tokens'].long(), batch['segment_ids'], batch['token_types'], labels=batch['labels'].long()
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    found = metrics(tmp_path / 'run', 'train/loss')
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    print('largest relative difference', np.max(np.abs(np.divide(found, losses) - 1)))
    assert losses[-1] < 0.9 * losses[0]
