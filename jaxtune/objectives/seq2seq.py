"""Text to text: from a record's source an encoder-decoder writes its target (Raffel et al. 2020, arXiv:1910.10683)."""

import hashlib
import json
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxtune.common import console
from jaxtune.data import Tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.cache import once
from jaxtune.data.packing import Bins, Row
from jaxtune.data.records import Records, field, open_records
from jaxtune.data.tokens import TokenWriter
from jaxtune.errors import UserError
from jaxtune.objectives import seq2seq_batch
from jaxtune.objectives.exact_match import score, summarise
from jaxtune.objectives.seq2seq_batch import KINDS

__all__ = ['KINDS', 'Pairs', 'dataset', 'loss', 'row', 'summarise']


def row(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: a source of `data.seq_len` places, a target of `data.target_len`."""
    return seq2seq_batch.make_row(config.data.seq_len, config.data.target_len or config.data.seq_len)


def dataset(config: ConfigDict, split: str, tokenizer, cache: pathlib.Path) -> 'Pairs':
    """Rows of `data.train` or `data.eval`: records, `seq2seq.prefix` before each source; several a row with packing.

    Both sides are tokenised once into the cache, each with the tokenizer's EOS at its end.

    Raises:
      UserError: no such data, records without the two texts (with `file:line`), or a tokenizer without EOS.
    """
    if config.data.format not in ('auto', 'pair'):
        raise UserError(f'data.format={config.data.format!r}: expected auto or pair for objective=seq2seq')
    key, data = f'data.{split}', config.data
    columns = {data.source_key: 'data.source_key', data.target_key: 'data.target_key'}
    records = open_records(data[split], key, columns)
    settings = [records.identity, tokenizers.fingerprint(tokenizer), list(columns), config.seq2seq.prefix]
    folder = cache / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    once(
        lambda: all((folder / side / 'meta.json').is_file() for side in ('source', 'target')),
        lambda: _tokenise(records, folder, tokenizer, config, key),
        key,
    )
    source, target = Tokens.open(folder / 'source'), Tokens.open(folder / 'target')
    target_len = data.target_len or data.seq_len
    pairs = Pairs(source, target, tokenizer.eos_token_id, data.seq_len, target_len, data.packing)
    for name, cut, length in (('source', pairs.cut_sources, 'seq_len'), ('target', pairs.cut_targets, 'target_len')):
        if cut:
            console.note(
                f'{records.name}: {cut:,} of {source.documents:,} {name}s are longer than data.{length} and cut'
            )
    return pairs


def _tokenise(records: Records, folder: pathlib.Path, tokenizer, config: ConfigDict, key: str) -> None:
    data, count = config.data, sum(1 for _ in records)
    if not count:
        raise UserError(f'{records.name}: the data is empty; expected at least one pair')
    source, target = (TokenWriter(folder / side, tokenizer, True, records.name) for side in ('source', 'target'))
    with console.progress(count, f'tokenise {key}', 'pair') as bar, target, source:
        for place, record in records:
            source.add(config.seq2seq.prefix + field(record, place, data.source_key, 'data.source_key'))
            target.add(field(record, place, data.target_key, 'data.target_key'))
            bar.advance(1)


def loss(config, model, params, batch, rng):
    """Summed negative log-likelihood of the targets in nats, their number, and sums for `summarise`."""
    hidden, targets, weights = seq2seq_batch.decode(model, params, batch, rng)
    nll, sums = score(hidden, model.head(params), targets, weights, batch['target_segment_ids'], rng)
    return nll, weights.sum(), sums


class Pairs:
    """Rows of pairs of texts by number.

    A source that is too long is cut before its EOS. A target that is too long has none: it does not end there.
    """

    def __init__(self, source: Tokens, target: Tokens, eos: int, seq_len: int, target_len: int, packing: bool):
        self.source, self.target, self.eos = source, target, eos
        self.seq_len, self.target_len = seq_len, target_len
        sources, targets = np.diff(source.offsets), np.diff(target.offsets)
        self.cut_sources = int((sources > seq_len).sum())
        self.cut_targets = int((targets > target_len).sum())
        sizes = seq2seq_batch.pair_sizes(
            np.minimum(sources, seq_len), np.minimum(targets, target_len), seq_len, target_len
        )
        self.bins = Bins(sizes, seq_len, packing)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Row:
        return seq2seq_batch.fill_row(
            (self._pair(number) for number in self.bins[index]), self.seq_len, self.target_len
        )

    def _pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        source = self.source.document(int(number))[: self.seq_len].copy()
        source[-1] = self.eos
        return source, self.target.document(int(number))[: self.target_len]
