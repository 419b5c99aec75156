"""`open_tokens`: the tokens of a split, from a prepare stage's folder or tokenised once into the workdir's cache."""

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.common import console
from jaxtune.data import holdout
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.documents import Documents, open_documents
from jaxtune.data.spec import DataSpec
from jaxtune.data.tokens import Tokens, TokenWriter
from jaxtune.errors import UserError
from jaxtune.parallel.hosts import many_processes

_PATIENCE_MS = 7 * 24 * 3600 * 1000


def open_tokens(data: DataSpec, split: str, tokenizer: PreTrainedTokenizerBase, cache: pathlib.Path) -> Tokens:
    """The tokens of `data.train` or `data.eval`.

    Args:
      data: names a prepare stage's workdir, or any documents (`jaxtune.data.documents.open_documents`).
      split: `'train'` or `'eval'`.
      tokenizer: what encodes; a prepared folder must have been made with the same.
      cache: documents are tokenised into a folder of their own in here, and found again while they, the tokenizer and
        these keys stay the same. Of several processes the first does it for all that see its disk.

    Raises:
      UserError: no such data, no text in it, or a prepared folder of another tokenizer.
    """
    key, path = f'data.{split}', data.path(split)
    prepared = prepared_tokens(path, key)
    if prepared is not None:
        tokens = _checked(Tokens.open(prepared), f'{key}={path}', tokenizer, data.append_eos)
        return check_rows(tokens, tokenizer, data.vocab_size, lambda number: f'{key}={path}: document {number + 1}')
    select = functools.partial(holdout.part, data=data, split=split)
    documents = open_documents(path, holdout.key_of(data, split), data.text_key, select)
    settings = [documents.identity, tokenizers.fingerprint(tokenizer), data.append_eos, split == 'eval']
    folder = cache / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    once(lambda: (folder / 'meta.json').is_file(), lambda: _tokenise(documents, folder, tokenizer, data, split), key)
    place = lambda number: next(itertools.islice(documents.places(), number, None))  # noqa: E731
    return check_rows(Tokens.open(folder), tokenizer, data.vocab_size, place)


def check_rows(
    tokens: Tokens, tokenizer: PreTrainedTokenizerBase, vocab_size: int, place: Callable[[int], str]
) -> Tokens:
    """The tokens, if a model has rows for all of them.

    Args:
      tokens: of documents.
      tokenizer: that made them.
      vocab_size: rows of the model; 0 = not known.
      place: number of a document -> where it stands, for the message.

    Raises:
      UserError: names the first that has none, and where it stands.
    """
    if vocab_size and (found := tokens.first_beyond(vocab_size)):
        number, token_id = found
        raise UserError(f'{place(number)}: {tokenizers.no_row(tokenizer, token_id, vocab_size)}')
    return tokens


def once(there: Callable[[], bool], build: Callable[[], None], what: str) -> None:
    """Builds something on disk: process 0 for all, then those that do not see its disk for themselves.

    Raises:
      UserError: in every process, if process 0 cannot build it.
    """
    several = many_processes() and jax.process_count() > 1
    problem = None
    if not several or jax.process_index() == 0:
        try:
            if not there():
                build()
        except UserError as error:
            if not several:
                raise
            problem = error
    if several:
        from jax.experimental import multihost_utils  # only pods need it
        from orbax.checkpoint import multihost  # only pods need it

        # Through the coordination service: a collective gives up after seconds, tokenising may take hours.
        multihost.get_barrier_sync_fn()(key=f'jaxtune:{what}', timeout_ms=_PATIENCE_MS)
        failed = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
        if failed:
            raise problem or UserError(f'{what}: process 0 cannot read the data; see its message')
        if not there():
            build()
        multihost.get_barrier_sync_fn()(key=f'jaxtune:{what}:all', timeout_ms=_PATIENCE_MS)


def prepared_tokens(path: str, key: str) -> pathlib.Path | None:
    """The folder of tokens that a key, `data.train` or `data.eval`, means where it names a prepare stage's workdir.

    Raises:
      UserError: the workdir has none, or is not finished.
    """
    split = key.removeprefix('data.')
    workdir = pathlib.Path(path).expanduser() if path else None
    if workdir is None or not workdir.is_dir():
        return None
    if (workdir / split / 'meta.json').is_file():
        return workdir / split
    other_split = {'train': 'eval', 'eval': 'train'}[split]
    if (workdir / other_split / 'meta.json').is_file():
        raise UserError(f'{key}={path}: the prepared folder has no {split}/; expected data.eval_fraction > 0 there')
    try:
        unfinished = json.loads((workdir / 'config.json').read_text(encoding='utf-8')).get('task') == 'prepare'
    except (OSError, ValueError, AttributeError):
        unfinished = False
    if unfinished:
        raise UserError(f'{key}={path}: the prepare run in this workdir has not finished; expected its {split}/')
    return None


def _checked(tokens: Tokens, name: str, tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> Tokens:
    if tokens.fingerprint != tokenizers.fingerprint(tokenizer):
        raise UserError(
            f'{name}: was prepared with another tokenizer (of {tokens.vocab_size} tokens) than this run uses (of '
            f'{tokenizers.vocab_size(tokenizer)}); expected tokenizer.path to name the one it was prepared with, and '
            'tokenizer.add the same tokens'
        )
    if tokens.append_eos != append_eos:
        raise UserError(
            f'{name}: was prepared with data.append_eos={tokens.append_eos}; expected the same here, not {append_eos}'
        )
    return tokens


def _tokenise(
    documents: Documents, folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase, data: DataSpec, split: str
) -> None:
    count, _ = documents.measure()  # finds a broken line before an hour of work, and how much there is to do
    writer = TokenWriter(folder, tokenizer, data.append_eos, documents.name, gzip=split == 'eval')
    with console.progress(count, f'tokenise data.{split}', 'document') as bar, writer:
        for text in documents:
            writer.add(text)
            bar.advance(1)
