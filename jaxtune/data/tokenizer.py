"""Tokenizers: opened from a folder or the hub, made of bytes, or trained (byte-level BPE)."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]: a name that is made when it is asked for
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from jaxtune.common import hub, paths, stderr
from jaxtune.common.hub import TOKENIZER_FILES, is_id
from jaxtune.errors import UserError, parsing

PAD, EOS, MASK = '<pad>', '<eos>', '<mask>'

# The split of Qwen2 (GPT-4's, but digit by digit): in a folder whose model_type is qwen2, transformers uses that one
# whatever the tokenizer's own file says, so that only this one gives the same ids everywhere.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# A pattern that backtracks without end does so on one letter many times, and then another.
_PROBES = [chr(letter) * 64 + end for letter in range(ord(' '), ord('~') + 1) for end in '!\n']


def load(path: str, key: str = 'tokenizer.path') -> PreTrainedTokenizerFast:
    """Opens a tokenizer.

    Args:
      path: a folder, a hub id, or `'bytes'`: id = byte for 0..255, then `<pad>`, `<eos>` and `<mask>`;
        no file is needed.
      key: what names it, for the message.

    Raises:
      UserError: there is none, or `transformers` cannot open it. Code that comes with a tokenizer is never run.
    """
    if path == 'bytes':
        return _quiet(_bytes())
    folder = paths.local(path, key)
    if not folder.is_dir():
        if folder.exists() or not is_id(path):
            raise UserError(f"{key}={path}: no such folder; expected a tokenizer's folder, a hub id or 'bytes'")
        folder = hub.resolve(path, key, ('config.json', *hub.COMPANIONS))
    hub.check_companions(folder)
    kind, held = AutoTokenizer, {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not held:
        raise UserError(f'{key}={path}: holds no tokenizer; expected tokenizer.json or one of its kind there')
    if held == {'vocab.json'} and (folder / 'merges.txt').is_file():
        kind = GPT2TokenizerFast  # GPT-2's two original files, which name no class
    with stderr.held_back(), parsing(f'{key}={path}: the tokenizer cannot be opened'):
        tokenizer = _quiet(kind.from_pretrained(str(folder), trust_remote_code=False))
        if not tokenizer.vocab_size:
            raise UserError(f'{key}={path}: the vocabulary of the tokenizer is empty; expected tokens')
    with stderr.held_back(), parsing(f'{key}={path}: the tokenizer fails on a text'):
        for text in _PROBES:
            (getattr(tokenizer, 'backend_tokenizer', None) or tokenizer).encode(text)
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) that gives every text back unchanged.

    Args:
      texts: the training documents, read once.
      vocab_size: entries at most, of which 0 is `<pad>`, 1 is `<eos>`, 2 is `<mask>` and 256 are bytes; little text
        gives fewer.
    """
    return train(texts, vocab_size)


def train(
    texts: Iterable[str], vocab_size: int, model: str = 'bpe', special_tokens: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Trains a byte-level tokenizer that gives every text back unchanged.

    Args:
      texts: the training documents, read once.
      vocab_size: as for `train_bpe`.
      model: `bpe` or `unigram` (Kudo 2018).
      special_tokens: further tokens that no text makes, from id 3 on.
    """
    special = [PAD, EOS, MASK, *(token for token in special_tokens if token not in (PAD, EOS, MASK))]
    tokenizer = tokenizers.Tokenizer(models.BPE() if model == 'bpe' else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kind = trainers.BpeTrainer if model == 'bpe' else trainers.UnigramTrainer
    trainer = kind(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _quiet(_wrap(tokenizer, special[3:]))


class Added(NamedTuple):
    """A token that a recipe adds.

    Attributes:
      id: its number.
      description: ids of the text that it begins as; () = of none.
      known: the tokenizer had it already.
    """

    id: int
    description: tuple[int, ...] = ()
    known: bool = False


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[tuple[str, str]]) -> tuple[Added, ...]:
    """Adds tokens, each whole wherever a text holds it; those that the tokenizer has stay as they are.

    They are not special: what a model writes shows them.

    Args:
      tokenizer: gets them.
      tokens: name and description (a text, '' = none) of each.

    Raises:
      UserError: the tokenizer cannot take one of them.
    """
    tokens, vocab = list(tokens), dict(tokenizer.get_vocab())
    with parsing('tokenizer.add: the tokenizer fails on a description'):
        ids = [tokenizer(text, add_special_tokens=False)['input_ids'] if text else [] for _, text in tokens]
    with parsing('tokenizer.add: the tokenizer does not take them'):
        new = [name for name, _ in tokens if name not in vocab]
        made: list[Any] = [AddedToken(name, normalized=False, special=False) for name in new]
        tokenizer.add_tokens(made)
    after, taken = tokenizer.get_vocab(), set(vocab.values())
    for name in new:
        if after.get(name) is None or after[name] in taken:
            raise UserError(f'tokenizer.add: {name!r}: the tokenizer does not take it; expected another name')
        taken.add(after[name])
    return tuple(
        Added(after[name], tuple(description), name in vocab)
        for (name, _), description in zip(tokens, ids, strict=True)
    )


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """Refuses a tokenizer whose vocabulary the model has no rows for; rows that no token uses are fine.

    Args:
      tokenizer: the tokenizer.
      vocab_size: rows of the model.

    Returns:
      Added tokens without a row, by id: a text that does not hold the name of one makes none.

    Raises:
      UserError: another token's id is `vocab_size` or more.
    """
    added = cast(Any, tokenizer).get_added_vocab()
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size)
    ordinary = [(token_id, token) for token_id, token in beyond if token not in added]
    if ordinary:
        largest, token = ordinary[-1]
        raise UserError(
            f'tokenizer.path: token {token!r} has id {largest}, but the model has vocab_size={vocab_size}: expected '
            f"the model's own tokenizer, or a model with vocab_size >= {largest + 1}"
        )
    return [token for _, token in beyond]


def no_row(tokenizer: PreTrainedTokenizerBase, token_id: int, vocab_size: int) -> str:
    """What to say of a text that holds a token without a row."""
    name = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f'holds the token {name!r} (id {token_id}), for which the model of {vocab_size} rows has none; expected '
        'tokenizer.add to name it'
    )


def vocab_size(tokenizer: PreTrainedTokenizerBase, below: int | None = None) -> int:
    """The smallest number of model rows that covers every token's id; of the ids less than `below`, where given."""
    ids = tokenizer.get_vocab().values()
    return max((i for i in ids if below is None or i < below), default=-1) + 1


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that pads and never ends a text: a classifier in `transformers` reads the last token that is not padding.

    A tokenizer that pads with its EOS gets its unknown token as padding, where that is another; else None, which
    `transformers` takes as "one row at a time".
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
            return None
        tokenizer.pad_token = tokenizer.unk_token
    padding: Any = tokenizer.pad_token_id
    return padding


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what turns text into ids: the same for a tokenizer that was saved and opened again."""
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    if backend is None:
        state = {'class': type(tokenizer).__name__, 'vocab': sorted(tokenizer.get_vocab().items())}
    else:
        state = json.loads(backend.to_str())
        for name in ('version', 'truncation', 'padding', 'decoder'):
            state.pop(name, None)
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def extends(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is another with tokens added, or the same; `other` gets them too."""
    if fingerprint(tokenizer) == fingerprint(other):
        return True
    there = other.get_vocab()
    added = sorted(tokenizer.added_tokens_decoder.items())
    other.add_tokens([token for _, token in added if str(token) not in there])
    return fingerprint(tokenizer) == fingerprint(other)


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text as `tokenizer(text)` gives them, its BOS or EOS where it adds one; uses all cores.

    Raises:
      UserError: the tokenizer fails on one of them, a pattern of its for example.
    """
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    with stderr.held_back(), parsing('the tokenizer fails on a text (tokenizer.path)'):
        if backend is None:
            return [tokenizer(text)['input_ids'] for text in texts]
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=True)]


def _bytes() -> PreTrainedTokenizerFast:
    # Byte-level BPE writes byte b as one printable character: its own where it has one, else the next from 256 on.
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS, MASK])
    return _wrap(tokenizer)


def _wrap(tokenizer: tokenizers.Tokenizer, special_tokens: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """In transformers' clothes. No BOS: a document's first token is not predicted."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=EOS,  # as GPT-2 has it: never made of bytes, but some classes add a token of their own where it lacks
        clean_up_tokenization_spaces=False,
        **({'additional_special_tokens': list(special_tokens)} if special_tokens else {}),
    )


def _quiet(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Without the warning on texts longer than the model: they are cut into rows later."""
    warned = getattr(tokenizer, 'deprecation_warnings', None)
    if warned is not None:
        warned['sequence-length-is-longer-than-the-specified-maximum'] = True
    return tokenizer
