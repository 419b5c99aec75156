import json
import subprocess
import sys

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError

BYTES = tokenizers.load('bytes')
TEXTS = ['def f(x):\n\treturn x + 12  # naïve\r\n', '漢字 and \U0001f600\u200d', "  don't  do,  that !  \n\n", '']
CORPUS = [*TEXTS, 'the quick brown fox jumps over the lazy dog, the quick one\n' * 20, 'return the quick value\n' * 9]
BPE = tokenizers.train_bpe(CORPUS, 320)
DECODERS = [name for name, family in models.families().items() if family.kind == 'decoder']


@given(st.text())
def test_bytes_are_ids_and_come_back(text):
    ids = BYTES(text)['input_ids']
    if '<' not in text:
        assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.text())
def test_bpe_comes_back(text):
    assert BPE.decode(BPE(text)['input_ids']) == text


def test_bpe_merges_and_special_tokens():
    assert (BPE.pad_token_id, BPE.eos_token_id, BPE.mask_token_id, BPE.bos_token_id) == (0, 1, 2, None)
    assert len(BPE) == 320
    assert len(BPE('the quick brown fox')['input_ids']) < 12
    assert (BYTES.pad_token_id, BYTES.eos_token_id, BYTES.mask_token_id, len(BYTES)) == (256, 257, 258, 259)


def test_training_is_the_same_in_every_process():
    texts = [f'{i * i} and {i % 7} is the {i}th of these lines' for i in range(2000)]
    code = (
        'import json, sys; from jaxtune.data import tokenizer as t;'
        'print(t.fingerprint(t.train_bpe(json.load(sys.stdin), 600)))'
    )
    other = subprocess.run(
        [sys.executable, '-c', code], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == tokenizers.fingerprint(tokenizers.train_bpe(texts, 600))


@pytest.mark.parametrize('tokenizer', [BYTES, BPE], ids=['bytes', 'bpe'])
@pytest.mark.parametrize('model_type', ['', *DECODERS])
def test_transformers_opens_an_export_with_the_same_ids(tokenizer, model_type, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    if model_type:
        (tmp_path / 'config.json').write_text(json.dumps({'model_type': model_type}))
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in CORPUS:
        assert again(text)['input_ids'] == tokenizer(text)['input_ids']
        assert again.decode(again(text)['input_ids']) == text
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizers.vocab_size(again) == tokenizers.vocab_size(tokenizer)


def test_fingerprint_survives_saving_and_tells_apart(tmp_path):
    BPE.save_pretrained(str(tmp_path))
    again = tokenizers.load(str(tmp_path))
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(BPE)
    again('some text', truncation=True, max_length=3)
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(BPE)
    assert tokenizers.fingerprint(BYTES) != tokenizers.fingerprint(BPE)
    again.eos_token = '<pad>'
    assert tokenizers.fingerprint(again) != tokenizers.fingerprint(BPE)


def test_batches_are_not_truncated_or_padded(tmp_path):
    again = tokenizers.load('bytes')
    again(['abc', 'a'], truncation=True, max_length=2, padding=True)
    assert tokenizers.encode_batch(again, ['abc', 'a']) == [[97, 98, 99], [97]]


def test_batch_is_what_transformers_gives(shared):
    tokenizer = tokenizers.load(str(shared / 'data/checkpoints/stories260K/hf'))
    assert tokenizers.encode_batch(tokenizer, TEXTS) == [tokenizer(text)['input_ids'] for text in TEXTS]
    assert tokenizers.encode_batch(tokenizer, ['Once'])[0][0] == tokenizer.bos_token_id


def test_gpt2_original_files(shared):
    tokenizer = tokenizers.load(str(shared / 'data/tokenizers/gpt2'))
    assert tokenizer('hello world')['input_ids'] == [31373, 995]


def test_long_texts_give_no_warning(tmp_path, caplog):
    BYTES.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings | {'model_max_length': 8}))
    tokenizer = tokenizers.load(str(tmp_path))
    assert tokenizer.model_max_length == 8
    transformers.logging.enable_propagation()
    try:
        tokenizer('longer than eight bytes')
    finally:
        transformers.logging.disable_propagation()
    assert 'longer' not in caplog.text


def test_check_vocab():
    assert tokenizers.check_vocab(BYTES, 259) == tokenizers.check_vocab(BYTES, 320) == []
    assert tokenizers.check_vocab(BYTES, 257) == ['<eos>', '<mask>']  # added, and no text without their names has them
    with pytest.raises(UserError, match=r"token 'ÿ' has id 255.*vocab_size=255.*vocab_size >= 256"):
        tokenizers.check_vocab(BYTES, 255)
    with pytest.raises(UserError, match=r'id 319.*vocab_size=319'):
        tokenizers.check_vocab(BPE, 319)
    assert tokenizers.vocab_size(BYTES) == 259
    assert tokenizers.vocab_size(BYTES, below=258) == 258


def test_added_tokens_are_whole_and_there_once(tmp_path):
    tokenizer = tokenizers.load('bytes')
    added = tokenizers.add_tokens(tokenizer, [('<a>', 'fox'), ('<eos>', ''), ('b c', '<a>')])
    assert [tuple(token) for token in added] == [
        (259, tuple(b'fox'), False), (257, (), True), (260, tuple(b'<a>'), False),
    ]  # fmt: skip
    ids = tokenizer('x<a>yb c<A>').input_ids
    assert ids == [120, 259, 121, 260, *b'<A>']
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'x<a>yb c<A>'
    again = tokenizers.add_tokens(tokenizer, [('b c', 'x'), ('<a>', '')])
    assert [(token.id, token.known) for token in again] == [(260, True), (259, True)]
    tokenizer.save_pretrained(str(tmp_path))
    opened = tokenizers.load(str(tmp_path))
    assert opened('x<a>').input_ids == [120, 259]
    assert tokenizers.fingerprint(opened) == tokenizers.fingerprint(tokenizer) != tokenizers.fingerprint(BYTES)
    assert tokenizers.extends(opened, tokenizers.load('bytes'))
    assert not tokenizers.extends(tokenizers.load('bytes'), opened)
    assert not tokenizers.extends(opened, BPE)


def test_errors_name_the_key(tmp_path):
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'tokenizer.json').write_text('{')
    (tmp_path / 'empty').mkdir()
    for path, words in {
        str(tmp_path / 'nowhere'): 'no such folder',
        str(tmp_path / 'empty'): 'holds no tokenizer',
        str(tmp_path / 'broken'): 'cannot be opened',
        'no-such-owner/no-such-tokenizer': 'no such folder, and the hub cannot be reached .HF_HUB_OFFLINE is set.',
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            tokenizers.load(path)
        assert str(caught.value).startswith(f'tokenizer.path={path}')
        assert '\n' not in str(caught.value)
