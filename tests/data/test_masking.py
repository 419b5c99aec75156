"""Which tokens a masked language model's rows hide."""

import grain
import numpy as np
import pytest

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.loader import Loader
from jaxtune.data.masking import Masking, word_joins
from jaxtune.errors import UserError

BYTES = tokenizers.load('bytes')
LENGTH, ROWS = 1000, 1200


def make_row(number: int, length: int = LENGTH, padding: int = 50) -> dict[str, np.ndarray]:
    """Random bytes, an EOS here and there, padding at the end."""
    rng = np.random.default_rng((7, number))
    tokens = rng.integers(0, 256, length)
    tokens[rng.integers(0, length - padding, 20)] = BYTES.eos_token_id
    segment_ids = (np.arange(length) < length - padding).astype(np.int32)
    return {'tokens': np.where(segment_ids > 0, tokens, 0).astype(np.int32), 'segment_ids': segment_ids}


def assert_share(count: int, total: int, expected: float):
    error = np.sqrt(expected * (1 - expected) / total)
    assert abs(count / total - expected) < 3 * error


@pytest.mark.parametrize('whole_word', [False, True])
def test_shares_over_a_million_tokens(whole_word):
    masking = Masking(BYTES, 0.15, whole_word, seed=2)
    may = chosen = masked = random = kept = 0
    for number in range(ROWS):
        row = make_row(number)
        hidden = masking(number, row)
        ordinary = (row['segment_ids'] > 0) & (row['tokens'] < 256)
        picked = hidden['loss_mask'] > 0
        assert not (picked & ~ordinary).any()
        np.testing.assert_array_equal(hidden['tokens'][~picked], row['tokens'][~picked])
        np.testing.assert_array_equal(hidden['targets'], row['tokens'])
        may += ordinary.sum()
        chosen += picked.sum()
        masked += (hidden['tokens'][picked] == BYTES.mask_token_id).sum()
        same = hidden['tokens'][picked] == row['tokens'][picked]
        kept += same.sum()
        random += (~same & (hidden['tokens'][picked] < 256)).sum()
    assert may > 1_000_000
    if not whole_word:  # words' tokens are chosen together: their number varies more
        assert_share(chosen, may, 0.15)
    assert abs(chosen / may - 0.15) < 0.002
    assert_share(masked, chosen, 0.8)
    # A random token is the old one once in 256.
    assert_share(random, chosen, 0.1 * 255 / 256)
    assert_share(kept, chosen, 0.1 + 0.1 / 256)
    assert masked + random + kept == chosen


def test_random_tokens_cover_the_ordinary_vocabulary_alone():
    masking = Masking(BYTES, 1.0)
    row = {'tokens': np.zeros(200_000, np.int32), 'segment_ids': np.ones(200_000, np.int32)}
    hidden = masking(0, row)['tokens']
    assert set(hidden[hidden != BYTES.mask_token_id]) == set(range(256))


def test_a_mask_is_a_function_of_seed_and_number():
    row = make_row(0)
    first = Masking(BYTES, 0.15, seed=(3, 0))(5, row)
    again = Masking(BYTES, 0.15, seed=(3, 0))(5, row)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    for other in (Masking(BYTES, 0.15, seed=(3, 0))(6, row), Masking(BYTES, 0.15, seed=(3, 1))(5, row)):
        assert (other['loss_mask'] != first['loss_mask']).any()


def test_each_pass_hides_other_tokens_and_held_out_rows_keep_theirs():
    rows = [make_row(number, 200) for number in range(6)]
    data = grain.MapDataset.source(rows).map_with_index(Masking(BYTES, 0.15))
    shuffled = Loader(data, 6, seed=0)

    def by_row(t):
        batch = shuffled.rows(t, 0, 6)
        return {
            targets.tobytes(): weights for targets, weights in zip(batch['targets'], batch['loss_mask'], strict=True)
        }

    first, second = by_row(0), by_row(1)
    assert set(first) == set(second)
    assert all((first[row] != second[row]).any() for row in first)
    # Any division over hosts sees the same global batch, and so does a run that begins later.
    parts = [Loader(data, 6, seed=0).rows(1, low, low + 2) for low in (0, 2, 4)]
    whole = shuffled.rows(1, 0, 6)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))
    fixed = Loader(data, 4, shuffle=False)
    for t in (0, 1):
        np.testing.assert_array_equal(fixed.rows(t, 0, 4)['tokens'], fixed.rows(t + 2, 0, 4)['tokens'])


def encode(tokenizer, text):
    tokens = np.asarray(tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
    return {'tokens': tokens, 'segment_ids': np.ones(len(tokens), np.int32)}


def test_whole_words_of_bytes():
    text = "the quick brown fox doesn't jump 2000 times; naïve"
    row, masking = encode(BYTES, text), Masking(BYTES, 0.4, whole_word=True)
    words = ['the', 'quick', 'brown', 'fox', 'doesn', 't', 'jump', '2000', 'times', 'naïve']
    seen = set()
    for number in range(60):
        weights, at = masking(number, row)['loss_mask'], 0
        for word in words:
            at = text.encode().index(word.encode(), at)
            part = weights[at : at + len(word.encode())]
            assert part.min() == part.max()
            seen.add((word, part[0]))
            at += len(word.encode())
    assert seen == {(word, weight) for word in words for weight in (0.0, 1.0)}


def test_whole_words_of_wordpiece_and_no_mask_token():
    import tokenizers as hf_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(['[UNK]', '[MASK]', 'un', '##aff', '##able', 'word'])}
    model = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token='[UNK]', mask_token='[MASK]')
    after, before = word_joins(tokenizer)
    assert after.tolist() == [False, False, False, True, True, False]
    assert before.all()
    row = {'tokens': np.array([2, 3, 4, 5, 0, 2], np.int32), 'segment_ids': np.array([1, 1, 1, 1, 1, 2], np.int32)}
    masking = Masking(tokenizer, 0.5, whole_word=True)
    weights = np.stack([masking(number, row)['loss_mask'] for number in range(50)])
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 4] == 0).all()  # the unknown token is special
    assert 0 < weights[:, 3].mean() < 1
    with pytest.raises(UserError, match=r'objective=masked_lm: the tokenizer has no mask token'):
        Masking(PreTrainedTokenizerFast(tokenizer_object=model, unk_token='[UNK]'), 0.15)


def test_tokens_without_a_row_are_never_put_in_place_of_one():
    tokenizer = tokenizers.load('bytes')
    tokenizers.add_tokens(tokenizer, [(f'<{i}>', '') for i in range(200)])
    row = encode(tokenizer, 'the quick brown fox jumps ' * 20)
    seen = {int(i) for n in range(20) for i in Masking(tokenizer, 1.0, vocab_size=260)(n, row)['tokens']}
    assert max(seen) < 260
    assert {int(i) for n in range(20) for i in Masking(tokenizer, 1.0)(n, row)['tokens']} - set(range(260))
    with pytest.raises(UserError, match=r"'<mask>' \(id 258\).*model of 258 rows"):
        Masking(tokenizer, 0.15, vocab_size=258)
