"""The short way: documents become a tokenizer and two folders of tokens, one of them held out.

Everything is a function of the documents and the recipe, so a run that was interrupted starts again and ends the same.
The documents are streamed once to sort them, once for the tokenizer and once for the tokens; what stays in memory is
one hash a document.
"""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from jaxtune.common import console
from jaxtune.common.io import replace_folder
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.documents import Documents, open_documents
from jaxtune.data.prepare import HELD_OUT
from jaxtune.data.tokens import TokenWriter
from jaxtune.errors import UserError

DROPPED, TRAIN, EVAL = 0, 1, 2


def collect(config: ConfigDict) -> Documents:
    """The documents of `data.train`, or of all `data.sources` (label -> path) one after the other.

    Raises:
      UserError: neither is given, or nothing is there.
    """
    data = config.data
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


class Plan:
    """Where each document goes, decided from its text alone.

    A document is held out if a hash of its text falls below the fraction; the same text never stands on both sides,
    and adding documents moves no other.

    Args:
      documents: read once here.
      min_chars: shorter ones are left out.
      eval_fraction: share to hold out; 0 holds out none, else both sides get at least one.

    Raises:
      UserError: too little is left.
    """

    def __init__(self, documents: Documents, min_chars: int, eval_fraction: float):
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
            scores.append(int.from_bytes(digest[:8], 'big') / 2**64 if keep else 2.0)
        self.sides, scores = np.frombuffer(sides, np.uint8), np.array(scores)
        kept = self.sides == TRAIN
        needed = 2 if eval_fraction else 1
        if kept.sum() < needed:
            raise UserError(
                f'{documents.name}: {len(sides)} documents, {self.short} shorter than data.min_chars={min_chars} '
                f'and {self.duplicates} duplicates: expected at least {needed} left (a .txt file is one document)'
            )
        if eval_fraction:
            held_out = kept & (scores < eval_fraction)
            held_out[np.argmin(scores)] = True
            if held_out.sum() == kept.sum():
                held_out[np.argmax(np.where(kept, scores, -1.0))] = False
            self.sides = np.where(held_out, EVAL, self.sides).astype(np.uint8)

    def count(self, side: int) -> int:
        return int(np.count_nonzero(self.sides == side))

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """`(side, text)` of every document that was kept."""
        for side, text in itertools.zip_longest(self.sides.tolist(), self.documents):
            if side is None or text is None:
                raise UserError(f'{self.documents.name}: changed while it was read; expected the same documents again')
            if side != DROPPED:
                yield side, text

    def texts(self, side: int) -> Iterator[str]:
        """The documents of one side."""
        return (text for its_side, text in self if its_side == side)


def make_tokenizer(config: ConfigDict, plan: Plan, folder: pathlib.Path):
    """The tokenizer named, or one trained on the training side; a copy lies in the folder either way."""
    if config.tokenizer.path:
        tokenizer = tokenizers.load(config.tokenizer.path)
    else:
        with console.progress(plan.count(TRAIN), 'train tokenizer', 'document') as bar:
            texts = (bar.advance(1) or text for text in plan.texts(TRAIN))
            tokenizer = tokenizers.train_bpe(texts, config.data.vocab_size)
    temporary = folder.with_name(f'.{folder.name}.new')
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(str(temporary))
    replace_folder(temporary, folder)
    return tokenizers.load(str(folder))


def write(config: ConfigDict, plan: Plan, tokenizer, workdir: pathlib.Path) -> None:
    """The two folders of tokens, and the held-out documents as text."""
    append_eos, source = config.data.append_eos, plan.documents.name
    train = TokenWriter(workdir / 'train', tokenizer, append_eos, source)
    held_out = TokenWriter(workdir / 'eval', tokenizer, append_eos, source, gzip=True)
    with console.progress(plan.count(TRAIN) + plan.count(EVAL), 'tokenise', 'document') as bar, train:
        if not plan.count(EVAL):
            for _, text in plan:
                train.add(text)
                bar.advance(1)
            return
        prompts = workdir / f'.{HELD_OUT}'
        with held_out, prompts.open('w', encoding='utf-8') as file:
            for side, text in plan:
                (train if side == TRAIN else held_out).add(text)
                if side == EVAL:
                    file.write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
                bar.advance(1)
        os.replace(prompts, workdir / HELD_OUT)
