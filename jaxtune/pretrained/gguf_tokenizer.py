"""A tokenizer as llama.cpp has it: tokens with their types, merges or scores, the name of its split, special tokens."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import numpy as np

from jaxtune.common import console
from jaxtune.data.chat_encoder import end_of_turn
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
_CASED = rf'{_WORD}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+%s|{_WORD}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*%s|'
_SLASHED = r'| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

# A split's regular expression, and whether words that are tokens skip the merges -> its name in llama.cpp, whose
# `llama-vocab.cpp` has the same expressions.
_SPLITS = {
    (_GPT2, False): 'gpt-2',
    (_LETTERS + r'\p{N}' + _REST, False): 'qwen2',
    (_LETTERS + r'\p{N}{1,3}' + _REST, True): 'llama-bpe',
    (_LETTERS + r'\p{N}{1,3}' + _REST, False): 'dbrx',
    (_CASED % ('', '') + r'\p{N}' + _SLASHED, True): 'tekken',
    (_CASED % (_ENDINGS, _ENDINGS) + r'\p{N}{1,3}' + _SLASHED, False): 'gpt-4o',
}
_SPACE = '▁'  # SentencePiece's
_KEY = 'export.format=gguf'


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's fields in a GGUF file.

    Attributes:
      model: `gpt2` for byte-level BPE, `llama` for SentencePiece's BPE with bytes for what it does not know.
      split: name of the expression that cuts texts before merges.
      tokens: one for each row of the model.
      types: of each.
      merges: in order, the two parts with a space between them (`gpt2`).
      scores: of each token; two neighbours whose union scores highest are merged first (`llama`).
      space_prefix: a text is read as if it began with a space (`llama`).
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool


def read(gguf: types.ModuleType, tokenizer: Any, rows: int) -> Vocabulary:
    """The fields of a tokenizer, for a model of so many rows.

    Raises:
      UserError: it is none that llama.cpp has in this form.
    """
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    state = json.loads(backend.to_str()) if backend else {'model': {'type': type(tokenizer).__name__}}
    kind = state['model'].get('type')
    if kind != 'BPE':
        raise UserError(f'{_KEY}: the tokenizer is of the kind {kind}; expected BPE')
    steps = _steps(state.get('pre_tokenizer'))
    is_bytes = any(step['type'] == 'ByteLevel' for step in steps)
    if not is_bytes and not state['model'].get('byte_fallback'):
        raise UserError(f'{_KEY}: the tokenizer is a BPE without bytes; expected a byte-level one, or byte_fallback')
    tokens, kinds = _tokens(gguf, tokenizer, state, rows)
    merges = [merge.split(' ') if isinstance(merge, str) else merge for merge in state['model']['merges']]
    if is_bytes:
        # llama.cpp refuses a file without merges. One of special tokens does nothing: no text makes them as parts.
        pairs = merges or [[tokenizer.eos_token or tokens[0], tokenizer.eos_token or tokens[0]]]
        split = _split(steps, bool(state['model'].get('ignore_merges')), bool(merges))
        return Vocabulary('gpt2', split, tokens, kinds, [' '.join(pair) for pair in pairs], [], False)
    scores = _scores(tokenizer, tokens, merges)
    return Vocabulary('llama', 'default', tokens, kinds, [], scores, _has_space_prefix(state, steps))


def write(gguf: types.ModuleType, writer: Any, tokenizer: Any, rows: int) -> None:
    """Writes a tokenizer, its special tokens and its chat template.

    Raises:
      UserError: as `read` does.
    """
    vocabulary = read(gguf, tokenizer, rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == 'llama':
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name in ('bos', 'eos', 'unk', 'sep', 'pad', 'mask'):
        token_id = getattr(tokenizer, f'{name}_token_id')
        if token_id is not None and token_id < rows:
            getattr(writer, f'add_{name}_token_id')(token_id)
    ids = tokenizer('a')['input_ids']
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        template = open_template('auto', tokenizer)
        writer.add_chat_template(template.source)
        end = end_of_turn(template, tokenizer)
        if end is not None and end != tokenizer.eos_token_id:
            writer.add_eot_token_id(end)


def _tokens(gguf: types.ModuleType, tokenizer: Any, state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; rows that no token has get a name of their own."""
    names = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
    added, unknown = tokenizer.added_tokens_decoder, state['model'].get('unk_token')
    falls_back = bool(state['model'].get('byte_fallback'))
    tokens, kinds = [], []
    for token_id in range(rows):
        name, kind = names.get(token_id), gguf.TokenType.NORMAL
        if name is None:
            name, kind = f'[PAD{token_id}]', gguf.TokenType.UNUSED
        elif falls_back and name == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif falls_back and len(name) == 6 and name.startswith('<0x') and name.endswith('>'):
            kind = gguf.TokenType.BYTE
        elif token_id in added:
            kind = gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED
            name = name.replace(_SPACE, ' ') if kind == gguf.TokenType.USER_DEFINED else name
        tokens.append(name)
        kinds.append(int(kind))
    return tokens, kinds


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer['pretokenizers'] if pre_tokenizer['type'] == 'Sequence' else [pre_tokenizer]


def _split(steps: list[dict[str, Any]], ignore_merges: bool, matters: bool) -> str:
    """The name of what cuts texts before merges; `default` with a note, where llama.cpp has none of the kind."""
    *first, last = steps
    if not matters:
        return 'gpt-2'
    if [step['type'] for step in first] == ['Digits'] and first[0].get('individual_digits') and last.get('use_regex'):
        return 'smollm'
    expression = None
    if not first and last.get('use_regex'):
        expression = _GPT2
    elif [step['type'] for step in first] == ['Split'] and not last.get('use_regex') and not first[0].get('invert'):
        expression = first[0]['pattern'].get('Regex')
    name = _SPLITS.get((expression or '', ignore_merges))
    if name is None:
        console.note(
            'model.gguf: llama.cpp has no name for the expression by which the tokenizer splits texts: its default '
            'stands there, and may cut texts into other tokens than the model was trained with'
        )
    return name or 'default'


def _has_space_prefix(state: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    normalizer = state.get('normalizer') or {}
    parts = normalizer.get('normalizers', [normalizer])
    prepends = any(part.get('type') == 'Prepend' and part.get('prepend') == _SPACE for part in parts)
    return prepends or any(
        step['type'] == 'Metaspace' and step.get('prepend_scheme', 'always') != 'never' for step in steps
    )


def _scores(tokenizer: Any, tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's scores from the model's own file, or such that tokens are merged in the order of the merges."""
    stored = {}
    path = pathlib.Path(str(tokenizer.name_or_path)) / 'tokenizer.model'
    if path.is_file():
        stored = sentencepiece_scores(path.read_bytes())
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [stored.get(token, -float(ranks.get(token, len(ranks)))) for token in tokens]


def sentencepiece_scores(content: bytes) -> dict[str, float]:
    """Pieces and scores of a SentencePiece model, a protocol buffer: field 1 is a piece, with its text and score."""
    scores = {}
    for number, piece in _fields(content):
        if number == 1 and isinstance(piece, bytes):
            values = dict(_fields(piece))
            text, score = values.get(1), values.get(2)
            if isinstance(text, bytes):
                scores[text.decode()] = float(np.frombuffer(score, '<f4')[0]) if isinstance(score, bytes) else 0.0
    return scores


def _fields(content: bytes) -> list[tuple[int, bytes | int]]:
    """Number and content of a message's fields."""
    found: list[tuple[int, bytes | int]] = []
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(content):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            found.append((number, varint()))
            continue
        size = {1: 8, 5: 4}.get(wire)
        size = varint() if size is None else size
        found.append((number, content[place : place + size]))
        place += size
    return found
