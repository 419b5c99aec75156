"""Encoder-decoder objectives: what their rows hold, and training against PyTorch step by step."""

import json

import numpy as np
import pytest
from runs import full_config, metrics, recipe, train

from jaxtune.data import Loader
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.models import hf
from jaxtune.objectives import seq2seq_batch, span_corruption
from jaxtune.pretrained.load import open_model
from jaxtune.tasks import specs

BYTES = tokenizers.load('bytes')
EOS = BYTES.eos_token_id


def config_of(corpus, objective='span_corruption', **changes):
    return full_config(recipe(corpus, objective, **changes))


def texts(corpus, split):
    return [json.loads(line)['text'] for line in (corpus / f'{split}.jsonl').read_text().splitlines()]


def parts(row):
    """`(source, target)` tokens of each segment of a row."""
    return [
        (
            row['tokens'][row['segment_ids'] == segment].tolist(),
            row['targets'][row['target_segment_ids'] == segment].tolist(),
        )
        for segment in range(1, row['segment_ids'].max() + 1)
    ]


def uncut(row):
    """The chunks that a row of span corruption was cut from, `[tokens]` each."""
    return [uncut_part(source, target) for source, target in parts(row)]


def uncut_part(source, target):
    assert source.pop() == target.pop() == EOS
    spans = []
    for token in target:
        if token < 0:
            assert token == -1 - len(spans)
            spans.append([])
        else:
            spans[-1].append(token)
    found = [token for token in source if token < 0]
    assert found == [-1 - i for i in range(len(spans))]
    return [token for entry in source for token in (spans[-1 - entry] if entry < 0 else [entry])]


def chunks_of(corpus, split, size):
    documents = [[*text.encode(), EOS] for text in texts(corpus, split)]
    return sorted(document[at : at + size] for document in documents for at in range(0, len(document), size))


def test_rows_give_the_documents_back_and_whole_chunks_fill_theirs(corpus, tmp_path):
    config = config_of(corpus)
    rows = specs.objective(config).dataset('train', BYTES, tmp_path)
    shapes = specs.objective(config).batch_spec()
    found, packed, places = [], 0, 0
    for number in range(len(rows)):
        row = rows[number]
        assert {name: (value.shape, value.dtype) for name, value in row.items()} == {
            name: (shape.shape, shape.dtype) for name, shape in shapes.items()
        }
        chunks = uncut(row)
        if len(chunks[0]) == 70:
            assert (row['segment_ids'] == 1).all()  # the source fills its row exactly
            assert row['target_segment_ids'].sum() == 14  # of 70 tokens: 10 hidden, 3 sentinels, EOS
        packed += len(chunks) > 1
        places += np.count_nonzero(row['segment_ids'])
        found += chunks
    assert sorted(found) == chunks_of(corpus, 'train', 70)
    assert packed
    assert places > 0.9 * len(rows) * config.data.seq_len


def test_each_pass_cuts_other_spans_and_held_out_rows_stay(corpus, tmp_path):
    config = config_of(corpus)
    rows = specs.objective(config).dataset('train', BYTES, tmp_path)
    first, second = rows[3], rows[3 + len(rows)]
    assert uncut(first) == uncut(second)
    assert not np.array_equal(first['tokens'], second['tokens'])
    again = specs.objective(config).dataset('train', BYTES, tmp_path)
    np.testing.assert_array_equal(rows[3]['tokens'], again[3]['tokens'])
    other = specs.objective(config_of(corpus, seed=7)).dataset('train', BYTES, tmp_path)
    assert not np.array_equal(first['tokens'], other[3]['tokens'])
    held_out = [specs.objective(config_of(corpus, seed=s)).dataset('eval', BYTES, tmp_path)[1] for s in (0, 7)]
    np.testing.assert_array_equal(held_out[0]['tokens'], held_out[1]['tokens'])


@pytest.mark.parametrize('mode', ['prefix', 'ul2'])
def test_other_modes_fit_their_rows(corpus, tmp_path, mode):
    config = config_of(corpus, span_corruption__mode=mode)
    rows = specs.objective(config).dataset('train', BYTES, tmp_path)
    modes = set()
    for number in range(3 * len(rows)):
        row = rows[number]
        assert all(source[-1] == target[-1] == EOS for source, target in parts(row))
        modes.add(int(row['tokens'][0]) if mode == 'ul2' else 0)
    assert modes == ({-98, -99, -100} if mode == 'ul2' else {0})


def test_without_packing_rows_are_chunks(corpus, tmp_path):
    rows = specs.objective(config_of(corpus, data__packing=False)).dataset('eval', BYTES, tmp_path)
    assert all(rows[number]['segment_ids'].max() == 1 for number in range(len(rows)))
    assert sorted(uncut(rows[number])[0] for number in range(len(rows))) == chunks_of(corpus, 'eval', 70)


@pytest.mark.parametrize('objective', ['span_corruption', 'seq2seq'])
def test_packed_rows_have_the_loss_and_gradients_of_rows_of_their_own(corpus, tmp_path, objective):
    import jax

    config = config_of(corpus, objective, data__seq_len=256, data__target_len=256)
    model, _ = open_model(specs.model_spec(config), BYTES)
    params = jax.jit(model.init)(jax.random.key(0))
    row = next(row for row in specs.objective(config).dataset('eval', BYTES, tmp_path) if row['segment_ids'].max() > 1)
    alone = [
        seq2seq_batch.fill_row([pair], len(row['tokens']), len(row['targets']))
        for pair in ([np.asarray(side) for side in part] for part in parts(row))
    ]

    def run(rows):
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        key = jax.random.key(0)  # None would be evaluation
        loss = jax.jit(jax.value_and_grad(lambda params: specs.objective(config).loss(model, params, batch, key)[0]))
        return loss(params)

    (ours, grads), (theirs, expected) = run([row]), run(alone)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), grads, expected)


class _WithSentinels:
    """A tokenizer with sentinels of its own."""

    eos_token_id = 1

    def __init__(self, count):
        self.count = count

    def get_vocab(self):
        return {'a': 0, '</s>': 1} | {f'<extra_id_{i}>': 1 + self.count - i for i in range(self.count)}


def test_sentinels_are_the_tokenizers_or_the_last_of_the_model(corpus):
    config = config_of(corpus)
    assert specs.objective(config).extra_vocab(BYTES) == 100
    assert specs.objective(config).extra_vocab(_WithSentinels(100)) == 0
    assert span_corruption._sentinels(config.data.seq_len, _WithSentinels(100), 4)[:2] == [101, 100]
    with pytest.raises(UserError, match=r'data\.seq_len=64: makes up to 4 sentinels, and the tokenizer has 3'):
        span_corruption._sentinels(config.data.seq_len, _WithSentinels(3), 4)
    model, _ = open_model(specs.model_spec(config), BYTES)
    assert model.config.vocab_size == -(-(len(BYTES) + 100) // 64) * 64
    assert model.config.start_id == BYTES.pad_token_id
    small = {**config.model.config.to_dict(), 'vocab_size': len(BYTES) + 99}
    with pytest.raises(UserError, match='objective=span_corruption: needs 100 tokens more'):
        open_model(specs.model_spec(full_config(recipe(corpus, 'span_corruption') | {'model.config': small})), BYTES)


def test_pairs_end_with_eos_unless_cut(tmp_path):
    pairs = [{'en': 'short', 'zh': '短'}, {'en': 'a source too long', 'zh': 'and its target'}, {'en': '', 'zh': ''}]
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
    keys = {
        'objective': 'seq2seq',
        'data.train': str(tmp_path / 'pairs.jsonl'),
        'data.source_key': 'en',
        'data.target_key': 'zh',
        'data.seq_len': 12,
        'data.target_len': 8,
        'seq2seq.prefix': 'zh: ',
    }
    expected = [
        ([*b'zh: short', EOS], [*'短'.encode(), EOS]),
        ([*b'zh: a sourc', EOS], [*b'and its ']),
        ([*b'zh: ', EOS], [EOS]),
    ]
    rows = specs.objective(full_config(keys | {'data.packing': False})).dataset('train', BYTES, tmp_path / 'cache')
    assert [parts(rows[number]) for number in range(len(rows))] == [[pair] for pair in expected]
    wide = full_config(keys | {'data.seq_len': 16})
    packed = specs.objective(wide).dataset('train', BYTES, tmp_path / 'cache')
    assert len(packed) == 2
    assert sorted(len(parts(packed[number])) for number in range(2)) == [1, 2]
    (tmp_path / 'broken.jsonl').write_text('{"en": "a", "zh": "b"}\n{"en": "a"}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:2: expected the field 'zh' \(data\.target_key\)"):
        specs.objective(full_config(keys | {'data.train': str(tmp_path / 'broken.jsonl')})).dataset(
            'train', BYTES, tmp_path / 'cache'
        )


@pytest.mark.parametrize('objective', ['span_corruption', 'seq2seq'])
def test_losses_of_20_steps_equal_transformers(corpus, tmp_path, objective):
    torch = pytest.importorskip('torch')
    import transformers

    keys = recipe(
        corpus,
        objective,
        optimizer__lr=3e-3,
        optimizer__eps=1e-8,
        optimizer__schedule='constant',
        optimizer__weight_decay=0.0,
    ) | {'optimizer.warmup_steps': 0, 'data.eval': '', 'data.packing': False}  # PyTorch's model knows no segment_ids
    config = full_config(keys)
    model, _ = open_model(specs.model_spec(config), BYTES)
    import jax

    hf.save(tmp_path / 'start', model, jax.jit(model.init)(jax.random.key(1)), add_files=BYTES.save_pretrained)
    del keys['model.config'], keys['tokenizer.path']
    train(keys | {'model.path': str(tmp_path / 'start')}, tmp_path / 'run')
    ours = metrics(tmp_path / 'run', 'train/loss')

    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'start').eval()  # eval: no dropout
    assert (
        theirs.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=2)[0, 0] == model.hf_config['decoder_start_token_id']
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rows = specs.objective(config).dataset('train', BYTES, tmp_path / 'cache')
    loader = Loader(rows, 16, config.seed)
    losses = []
    for t in range(20):
        batch = loader.rows(t, 0, 16)
        for name in ('tokens', 'targets'):
            batch[name] = np.where(batch[name] < 0, model.config.vocab_size + batch[name], batch[name])
        labels = torch.tensor(np.where(batch['target_segment_ids'] > 0, batch['targets'], -100)).long()
        inputs = {'input_ids': torch.tensor(batch['tokens']), 'attention_mask': torch.tensor(batch['segment_ids'])}
        loss = theirs(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(ours, losses, rtol=1e-3)
