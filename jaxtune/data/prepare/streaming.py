"""The pipeline of a recipe without steps: documents become a tokenizer and two folders of tokens, one held out.

Everything is a function of the documents and the recipe, so a run that was interrupted starts again and ends the same.
The documents are streamed once to sort them, once for the tokenizer and once for the tokens; what stays in memory is
one hash a document. Nothing of the extra `[data]` is needed.
"""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxtune.common import console
from jaxtune.common.io import replace_folder
from jaxtune.common.settings import Settings
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.documents import Documents, open_documents
from jaxtune.data.prepare import HELD_OUT, Phase
from jaxtune.data.prepare.assign_splits import DROPPED, EVAL, TRAIN, held_out
from jaxtune.data.tokens import Tokens, TokenWriter
from jaxtune.errors import UserError


def collect(data: Settings) -> Documents:
    """The documents of `data.train`, or of all `data.sources` (label -> path) one after the other.

    Raises:
      UserError: neither is given, or nothing is there.
    """
    if data.train:
        return open_documents(data.train, 'data.train', data.text_key)
    parts = []
    for label, path in data.sources.items():
        if not isinstance(path, str):
            raise UserError(f'data.sources.{label}={path!r}: expected a path, a glob, a folder or a dataset id')
        parts.append(open_documents(path, f'data.sources.{label}', data.text_key))
    if not parts:
        raise UserError("data.train='': expected a path, a glob, a folder, a dataset id or python-stdlib")
    name = ', '.join(part.name for part in parts)
    return Documents(name, [part.identity for part in parts], lambda: itertools.chain.from_iterable(parts))


class Splits:
    """The split of each document, decided from its text alone.

    A document is held out if a hash of its text falls below the fraction; the same text never stands in both splits,
    and adding documents moves no other.

    Args:
      documents: read once here.
      min_chars: shorter ones are left out.
      eval_fraction: share to hold out; 0 holds out none, else both splits get at least one.

    Raises:
      UserError: too little is left.
    """

    def __init__(self, documents: Documents, min_chars: int, eval_fraction: float) -> None:
        self.documents = documents
        self.short = self.duplicates = 0
        sides, scores, seen = bytearray(), [], set()
        for text in documents:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            keep = len(text) >= min_chars and digest not in seen
            self.short += len(text) < min_chars
            self.duplicates += len(text) >= min_chars and digest in seen
            if keep:
                seen.add(digest)
            sides.append(TRAIN if keep else DROPPED)
            scores.append(int.from_bytes(digest[:8], 'big') / 2**64)
        self.sides = np.frombuffer(sides, np.uint8)
        kept = self.sides == TRAIN
        needed = 2 if eval_fraction else 1
        if kept.sum() < needed:
            raise UserError(
                f'{documents.name}: {len(sides)} documents, {self.short} shorter than data.min_chars={min_chars} '
                f'and {self.duplicates} duplicates: expected at least {needed} left (a .txt file is one document)'
            )
        self.sides = np.where(held_out(kept, np.array(scores), eval_fraction), EVAL, self.sides).astype(np.uint8)

    def count(self, side: int) -> int:
        """How many documents one split has."""
        return int(np.count_nonzero(self.sides == side))

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """`(split, text)` of every document that was kept."""
        for side, text in itertools.zip_longest(self.sides.tolist(), self.documents):
            if side is None or text is None:
                raise UserError(f'{self.documents.name}: changed while it was read; expected the same documents again')
            if side != DROPPED:
                yield side, text

    def texts(self, side: int) -> Iterator[str]:
        """The documents of one split."""
        return (text for its_side, text in self if its_side == side)


class Streaming:
    """The phases, and what they hand on to each other in memory.

    Args:
      documents: what to read.
      data: the recipe's `data`: `min_chars`, `eval_fraction`, `vocab_size` and `append_eos` are read.
      tokenizer: the recipe's `tokenizer.path`; '' = train one.
      workdir: where the results go.
      added: the recipe's `tokenizer.add`: name and description of tokens that it gets.
    """

    splits: Splits
    tokenizer: Any

    def __init__(
        self,
        documents: Documents,
        data: Settings,
        tokenizer: str,
        workdir: pathlib.Path,
        added: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.documents, self.data, self.tokenizer_path, self.workdir = documents, data, tokenizer, workdir
        self.added = added

    @property
    def pipeline(self) -> list[Phase]:
        """The phases in order: `(name, what it does, function)`."""
        return [
            Phase('collect', 'short documents and duplicates are dropped, documents are held out', self._collect),
            Phase('tokenizer', 'one is trained, or the one named is copied', self._make_tokenizer),
            Phase('tokenise', 'documents become tokens', self._tokenise),
        ]

    def _collect(self) -> None:
        self.splits = Splits(self.documents, self.data.min_chars, self.data.eval_fraction)

    def _make_tokenizer(self) -> None:
        folder = self.workdir / 'tokenizer'
        if self.tokenizer_path:
            tokenizer = tokenizers.load(self.tokenizer_path)
        else:
            with console.progress(self.splits.count(TRAIN), 'train tokenizer', 'document') as bar:
                texts = (bar.advance(1) or text for text in self.splits.texts(TRAIN))
                tokenizer = tokenizers.train_bpe(texts, self.data.vocab_size)
        tokenizers.add_tokens(tokenizer, self.added)
        temporary = folder.with_name(f'.{folder.name}.new')
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save_pretrained(str(temporary))
        replace_folder(temporary, folder)
        self.tokenizer = tokenizers.load(str(folder))

    def _tokenise(self) -> None:
        """Writes the two folders of tokens, and the held-out documents as text."""
        splits, append_eos = self.splits, self.data.append_eos
        train = TokenWriter(self.workdir / 'train', self.tokenizer, append_eos, self.documents.name)
        evaluation = TokenWriter(self.workdir / 'eval', self.tokenizer, append_eos, self.documents.name, gzip=True)
        total = splits.count(TRAIN) + splits.count(EVAL)
        with console.progress(total, 'tokenise', 'document') as bar, train:
            if not splits.count(EVAL):
                for _, text in splits:
                    train.add(text)
                    bar.advance(1)
                return
            prompts = self.workdir / f'.{HELD_OUT}'
            with evaluation, prompts.open('w', encoding='utf-8') as file:
                for side, text in splits:
                    (train if side == TRAIN else evaluation).add(text)
                    if side == EVAL:
                        file.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
                    bar.advance(1)
            os.replace(prompts, self.workdir / HELD_OUT)

    def metrics(self) -> dict[str, Any]:
        """What was made, for `result.json`."""
        splits = self.splits
        train = Tokens.open(self.workdir / 'train')
        evaluation = Tokens.open(self.workdir / 'eval') if splits.count(EVAL) else None
        metrics = {
            'data/documents': splits.count(TRAIN) + splits.count(EVAL),
            'data/train_documents': splits.count(TRAIN),
            'data/eval_documents': splits.count(EVAL),
            'data/dropped_short': splits.short,
            'data/dropped_duplicates': splits.duplicates,
            'data/text_bytes': train.text_bytes + (evaluation.text_bytes if evaluation else 0),
            'data/train_tokens': len(train),
            'data/eval_tokens': len(evaluation) if evaluation else 0,
            'data/bytes_per_token': train.text_bytes / len(train),
            'data/vocab_size': train.vocab_size,
        }
        if evaluation and evaluation.gzip_bits_per_byte is not None:
            metrics['data/eval_gzip_bits_per_byte'] = evaluation.gzip_bits_per_byte
        return metrics
