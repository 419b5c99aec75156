import gzip
import json

import numpy as np
import pytest

from jaxtune.data import open_tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.spec import DataSpec
from jaxtune.data.tokens import Tokens, TokenWriter
from jaxtune.errors import UserError

BYTES = tokenizers.load('bytes')
TEXTS = ['Grüße', '', 'a longer\ndocument ' * 50, '漢']


def write(folder, texts=TEXTS, tokenizer=BYTES, **settings):
    with TokenWriter(folder, tokenizer, **({'append_eos': True} | settings)) as writer:
        writer.add_all(texts)
    return Tokens.open(folder)


@pytest.mark.parametrize('append_eos', [True, False])
def test_round_trip(append_eos, tmp_path):
    tokens = write(tmp_path / 'a', append_eos=append_eos)
    end = [BYTES.eos_token_id] if append_eos else []
    assert tokens.documents == len(TEXTS)
    for i, text in enumerate(TEXTS):
        assert tokens.document(i).tolist() == [*text.encode(), *end]
    assert tokens.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (tokens.tokens.dtype, tokens.offsets.dtype, tokens.vocab_size) == (np.uint16, np.int64, 259)
    assert len(tokens) == tokens.offsets[-1] == tokens.text_bytes + append_eos * len(TEXTS)


def test_gzip_is_that_of_the_documents_joined(tmp_path):
    expected = 8 * len(gzip.compress('\n'.join(TEXTS).encode(), 9)) / sum(len(text.encode()) for text in TEXTS)
    assert write(tmp_path / 'a', gzip=True).gzip_bits_per_byte == expected
    assert write(tmp_path / 'b').gzip_bits_per_byte is None


def test_an_eos_of_the_tokenizers_own_is_not_doubled(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers.load('bytes')
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing('$A <eos>', special_tokens=[('<eos>', 257)])
    assert write(tmp_path / 'a', ['ab'], tokenizer).tokens.tolist() == [97, 98, 257]
    assert tokenizers.fingerprint(tokenizer) != tokenizers.fingerprint(BYTES)


def test_a_wide_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = tokenizers.load('bytes')
    tokenizer.add_tokens([f'<{i}>' for i in range(1 << 16)])
    tokens = write(tmp_path / 'a', ['a<65535>'], tokenizer, append_eos=False)
    assert tokens.tokens.dtype == np.uint32
    assert tokens.tokens.tolist() == [97, 259 + 65535]


def test_no_eos_to_append(tmp_path):
    tokenizer = tokenizers.load('bytes')
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r'data\.append_eos=True: .*no EOS'):
        TokenWriter(tmp_path / 'a', tokenizer, True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def broken():
        yield 'text'
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(tmp_path / 'a', broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / '.a.12345').mkdir()  # left by a run that was killed
    write(tmp_path / 'a', ['old'])
    assert write(tmp_path / 'a', ['newer']).documents == 1
    assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_damage_is_noticed(tmp_path):
    write(tmp_path / 'a')
    with (tmp_path / 'a' / 'tokens.bin').open('ab') as file:
        file.write(b'\0\0')
    with pytest.raises(UserError, match='damaged'):
        Tokens.open(tmp_path / 'a')
    (tmp_path / 'a' / 'tokens.bin').write_bytes(b'\0\0')
    with pytest.raises(UserError, match='expected tokens as a prepare stage writes them'):
        Tokens.open(tmp_path / 'a')
    (tmp_path / 'a' / 'meta.json').unlink()
    with pytest.raises(UserError, match='expected tokens as a prepare stage writes them'):
        Tokens.open(tmp_path / 'a')


def test_documents_are_tokenised_once(tmp_path, monkeypatch):
    file, cache = tmp_path / 'a.txt', tmp_path / 'cache'
    file.write_text('some text')
    calls = []
    real = tokenizers.encode_batch
    monkeypatch.setattr(tokenizers, 'encode_batch', lambda *arguments: calls.append(1) or real(*arguments))

    def opened(split='train', **changes):
        return open_tokens(DataSpec(str(file), str(file), **changes), split, BYTES, cache)

    assert opened().tokens.tolist() == [*b'some text', 257]
    assert opened().tokens.tolist() == [*b'some text', 257]
    assert len(calls) == 1
    assert opened(append_eos=False).tokens.tolist() == [*b'some text']
    assert opened('eval').gzip_bits_per_byte > 8
    assert opened().gzip_bits_per_byte is None
    assert len(calls) == 3
    file.write_text('other text')
    assert opened().tokens.tolist() == [*b'other text', 257]
    assert len(calls) == 4


def test_broken_data_leaves_no_cache(tmp_path):
    file, cache = tmp_path / 'a.jsonl', tmp_path / 'cache'
    file.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r'a\.jsonl:2: expected one JSON object'):
        open_tokens(DataSpec(str(file), str(file)), 'train', BYTES, cache)
    assert not cache.exists() or not list(cache.iterdir())
    file.write_text('')
    with pytest.raises(UserError, match=r'data\.eval=.*: the data is empty'):
        open_tokens(DataSpec(str(file), str(file)), 'eval', BYTES, cache)


def test_a_prepared_folder_must_fit(tmp_path):
    write(tmp_path / 'train', ['a'])
    path, cache = str(tmp_path), tmp_path / 'cache'
    assert open_tokens(DataSpec(path, path), 'train', BYTES, cache).tokens.tolist() == [97, 257]
    assert not cache.exists()
    other = tokenizers.train_bpe(['some text'], 300)
    with pytest.raises(UserError, match=r'data\.train=.*another tokenizer.*tokenizer\.path'):
        open_tokens(DataSpec(path, path), 'train', other, cache)
    with pytest.raises(UserError, match=r'append_eos=True; expected the same here, not False'):
        open_tokens(DataSpec(path, path, append_eos=False), 'train', BYTES, cache)
    with pytest.raises(UserError, match=r'data\.eval=.*no eval/'):
        open_tokens(DataSpec(path, path), 'eval', BYTES, cache)
    (tmp_path / 'unfinished').mkdir()
    (tmp_path / 'unfinished' / 'config.json').write_text(json.dumps({'task': 'prepare'}))
    with pytest.raises(UserError, match='has not finished'):
        open_tokens(DataSpec(str(tmp_path / 'unfinished'), str(tmp_path / 'unfinished')), 'train', BYTES, cache)
