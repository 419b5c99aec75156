"""Token files: every document's ids one after the other in a memory-mapped file, with an index of where each begins."""

import array
import dataclasses
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.common.io import replace_folder
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError

# Above this the reference compression takes longer than it is worth.
GZIP_LIMIT = 64 << 20
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 21, 4096
_SCANNED = 1 << 24  # ids looked at together


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A folder of tokens, open for reading.

    Attributes:
      tokens: ids, memory-mapped, `[tokens]`, uint16 or uint32: an array, or `Shards` of a folder with several files.
      offsets: where each document begins, and the end, int64 `[documents + 1]`.
      text_bytes: UTF-8 bytes of the documents.
      vocab_size: one more than the largest id the tokenizer has.
      gzip_bits_per_byte: what `gzip -9` makes of the documents joined by newlines; None if it was not measured.
      fingerprint: of the tokenizer (`jaxtune.data.tokenizer.fingerprint`).
      append_eos: whether documents end with the tokenizer's EOS.
    """

    tokens: 'np.ndarray | Shards'
    offsets: np.ndarray
    text_bytes: int
    vocab_size: int
    gzip_bits_per_byte: float | None = None
    fingerprint: str = ''
    append_eos: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets) - 1

    def first_beyond(self, vocab_size: int) -> tuple[int, int] | None:
        """`(document, id)` of the first id for which a model of so many rows has none; None where there is none."""
        if self.vocab_size <= vocab_size:
            return None
        for start in range(0, len(self), _SCANNED):
            ids = np.asarray(self.tokens[start : start + _SCANNED])
            if len(places := np.flatnonzero(ids >= vocab_size)):
                place = start + int(places[0])
                return int(np.searchsorted(self.offsets, place, 'right')) - 1, int(ids[places[0]])
        return None

    def document(self, index: int) -> np.ndarray:
        """The ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def open(cls, folder: pathlib.Path) -> 'Tokens':
        """Maps a folder that `TokenWriter` made.

        Raises:
          UserError: it is damaged.
        """
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            offsets = np.load(folder / 'offsets.npy', allow_pickle=False)
            dtype = {'uint16': np.uint16, 'uint32': np.uint32}[meta['dtype']]
            files = [folder / 'tokens.bin']
            if len(counts := meta.get('shards') or [meta['tokens']]) > 1:
                files = [folder / f'tokens-{i:05d}.bin' for i in range(len(counts))]
            parts: list[np.ndarray] = [
                np.memmap(file, dtype, 'r', shape=(count,)) for file, count in zip(files, counts, strict=True)
            ]
            sizes = all(file.stat().st_size == part.nbytes for file, part in zip(files, parts, strict=True))
            whole = sizes and offsets[-1] == meta['tokens'] == sum(counts)
            tokens = parts[0] if len(parts) == 1 else Shards(parts)
            fields = [
                meta[name] for name in ('text_bytes', 'vocab_size', 'gzip_bits_per_byte', 'tokenizer', 'append_eos')
            ]
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise UserError(f'{folder}: expected tokens as a prepare stage writes them: {error}') from None
        if not whole:
            raise UserError(f'{folder}: damaged: tokens.bin or offsets.npy is not as long as meta.json says')
        return cls(tokens, offsets, *fields)


class Shards:
    """Several files as one array that can be sliced; a slice within one file is a view of it.

    Args:
      parts: memory-mapped arrays of one type.
    """

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts, self.dtype = parts, parts[0].dtype
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        first = int(np.searchsorted(self.ends, start, 'right'))
        pieces = [self.parts[0][:0]]
        while start < stop:
            begin = int(self.ends[first]) - len(self.parts[first])
            end = min(stop, int(self.ends[first]))
            pieces.append(self.parts[first][start - begin : end - begin])
            start, first = end, first + 1
        return pieces[-1] if len(pieces) <= 2 else np.concatenate(pieces)


class TokenWriter:
    """Tokenises documents into a folder that appears whole or not at all.

    Used as a context manager: leaving it without an exception puts the folder in place (instead of an older one).

    Args:
      folder: where it will be.
      tokenizer: what encodes.
      append_eos: end every document with the tokenizer's EOS, where it does not do so itself.
      source: where the documents come from, noted in `meta.json`.
      gzip: measure what `gzip -9` makes of them, up to `GZIP_LIMIT` bytes.

    Raises:
      UserError: `append_eos` and the tokenizer has no EOS.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        tokenizer: PreTrainedTokenizerBase,
        append_eos: bool,
        source: str = '',
        gzip: bool = False,
    ) -> None:
        self.eos = tokenizer.eos_token_id if append_eos else None
        if append_eos and self.eos is None:
            raise UserError('data.append_eos=True: the tokenizer has no EOS token; expected data.append_eos=False')
        self.folder, self.tokenizer, self.source, self.append_eos = folder, tokenizer, source, append_eos
        self.vocab_size = tokenizers.vocab_size(tokenizer)
        self.dtype = dtype_of(self.vocab_size)
        self.text_bytes, self.lengths = 0, array.array('q')
        self.pending: list[str] = []
        self.pending_characters = 0
        self.gzip = zlib.compressobj(9, wbits=31) if gzip else None
        self.gzip_bytes = 0

    def __enter__(self) -> 'TokenWriter':
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.folder.with_name(f'.{self.folder.name}.{os.getpid()}')
        for left in self.folder.parent.glob(f'.{self.folder.name}.*'):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.temporary.mkdir()
        self.file = (self.temporary / 'tokens.bin').open('wb')
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._flush()
                self.file.close()
                self._finish()
        finally:
            self.file.close()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, text: str) -> None:
        """Takes one document more."""
        data = text.encode()
        if self.gzip is not None:
            self._measure(data)
        self.text_bytes += len(data)
        self.pending.append(text)
        self.pending_characters += len(text)
        if self.pending_characters >= _BATCH_CHARACTERS or len(self.pending) >= _BATCH_DOCUMENTS:
            self._flush()

    def add_all(self, texts: Iterable[str]) -> None:
        """Takes many documents."""
        for text in texts:
            self.add(text)

    def _measure(self, data: bytes) -> None:
        if self.text_bytes + len(data) > GZIP_LIMIT:
            self.gzip = None
            return
        first = not self.lengths and not self.pending
        assert self.gzip is not None
        self.gzip_bytes += len(self.gzip.compress(data if first else b'\n' + data))

    def _flush(self) -> None:
        for ids in tokenizers.encode_batch(self.tokenizer, self.pending):
            if self.append_eos and (not ids or ids[-1] != self.eos):
                ids = [*ids, self.eos]
            self.lengths.append(len(ids))
            np.asarray(ids, self.dtype).tofile(self.file)
        self.pending, self.pending_characters = [], 0

    def _finish(self) -> None:
        ratio = None
        if self.gzip is not None and self.text_bytes:
            ratio = 8 * (self.gzip_bytes + len(self.gzip.flush())) / self.text_bytes
        lengths = np.array(self.lengths, np.int64)
        write_meta(self.temporary, lengths, self.text_bytes, self.tokenizer, self.append_eos, self.source, ratio)
        replace_folder(self.temporary, self.folder)


def write_meta(
    folder: pathlib.Path,
    lengths: np.ndarray,
    text_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
    source: str,
    gzip_bits_per_byte: float | None,
    shards: list[int] | None = None,
) -> dict[str, Any]:
    """Writes `offsets.npy` and `meta.json` beside the tokens of a folder; returns what the latter holds.

    Args:
      folder: where the tokens are.
      lengths: ids of each document, `[documents]`.
      text_bytes: of all texts, in UTF-8.
      tokenizer: that made the ids.
      append_eos: whether each document ends in EOS.
      source: what the documents are, for messages.
      gzip_bits_per_byte: what `gzip -9` needs for the texts; None where it was not asked.
      shards: ids in each file, where there are several.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    np.save(folder / 'offsets.npy', offsets, allow_pickle=False)
    vocab_size = tokenizers.vocab_size(tokenizer)
    meta = {
        'documents': len(lengths),
        'tokens': int(offsets[-1]),
        'text_bytes': text_bytes,
        'gzip_bits_per_byte': gzip_bits_per_byte,
        'dtype': np.dtype(dtype_of(vocab_size)).name,
        'vocab_size': vocab_size,
        'tokenizer': tokenizers.fingerprint(tokenizer),
        'append_eos': append_eos,
        'source': source,
    }
    if shards is not None and len(shards) > 1:
        meta['shards'] = shards
    (folder / 'meta.json').write_text(json.dumps(meta, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    return meta


def dtype_of(vocab_size: int) -> type:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32
