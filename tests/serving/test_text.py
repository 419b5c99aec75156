"""Text of tokens, piece by piece: whole characters only, and nothing of what ends it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxtune.data import tokenizer as tokenizers
from jaxtune.serving.text import Names, Writer

BYTES = tokenizers.load('bytes')
BPE = tokenizers.train_bpe(['the cat sat on the mat, 你好世界 and naïve café 🎉🎉'] * 4, 320)
PROMPT = 'Read: 你'


def written(tokenizer, ids, stops=(), prompt=PROMPT):
    """The pieces of a text, and their tokens."""
    writer = Writer(tokenizer, tokenizer(prompt).input_ids, stops)
    pieces = []
    for number, token in enumerate(ids):
        writer.write(token, -float(number), [])
        pieces.append(writer.take())
        if writer.stopped:
            return pieces
    writer.end()
    return [*pieces, writer.take(ended=True)]


@pytest.mark.parametrize('tokenizer', [BYTES, BPE], ids=['bytes', 'bpe'])
@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.text(alphabet='abc ,é你好🎉', max_size=30),
    st.lists(st.text(alphabet='abc é你🎉', min_size=1, max_size=4), max_size=3),
)
@example('xabcd', ['abcd', 'bc'])
def test_pieces_are_the_text_up_to_the_stop_that_ends_first(tokenizer, text, stops):
    pieces = written(tokenizer, tokenizer(text).input_ids, stops)
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1] if ends else len(text)]
    assert ''.join(piece for piece, _ in pieces) == expected
    tokens = [token for _, own in pieces for token in own]
    ids = tokenizer(text).input_ids
    assert [token.id for token in tokens] == ids[: len(tokens)]
    assert ends or len(tokens) == len(ids)
    assert [token.logprob for token in tokens] == [-float(number) for number in range(len(tokens))]
    assert all(token.start < len(expected) or not ends for token in tokens)


def test_half_a_character_waits_for_the_rest():
    ids = BYTES('é🎉').input_ids
    shown = [piece for piece, _ in written(BYTES, ids)]
    assert shown == ['', 'é', '', '', '', '🎉', '']
    broken = written(BYTES, [*ids[:3], *BYTES('a').input_ids, *ids[2:4]])
    assert ''.join(piece for piece, _ in broken) == 'é\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}'
    endless = written(BYTES, [0xF0] * 200)
    assert any(piece for piece, _ in endless[:100])
    assert len(''.join(piece for piece, _ in endless)) == 200


def test_what_could_be_a_stop_is_held_back_and_given_where_it_is_none():
    pieces = [piece for piece, _ in written(BYTES, BYTES('a<<b<<END').input_ids, ['<<END', 'never'])]
    assert pieces == ['a', '', '', '<<b', '', '', '', '', '']


def test_tokens_have_names_and_bytes():
    names = Names(BYTES)
    assert names(ord('a')) == ('a', [97])
    assert names(0xE4) == ('bytes:\\xe4', [0xE4])
    assert names(257) == ('<eos>', list(b'<eos>'))
    assert names(300) == ('', [])
