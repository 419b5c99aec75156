"""Text to text: from a record's source an encoder-decoder writes its target (Raffel et al. 2020, arXiv:1910.10683)."""

import hashlib
import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.data import Tokens, holdout
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.cache import check_rows, once
from jaxtune.data.packing import Bins, Row
from jaxtune.data.records import Records, field, open_records
from jaxtune.data.spec import DataSpec
from jaxtune.data.tokens import TokenWriter
from jaxtune.errors import UserError
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Sums, seq2seq_batch
from jaxtune.objectives.exact_match import score, summarise


def batch_spec(settings: Settings, data: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: a source of `data.seq_len` places, a target of `data.target_len`."""
    return seq2seq_batch.make_row(data.seq_len, data.target_len or data.seq_len)


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> 'Pairs':
    """Rows of `data.train` or `data.eval`: records, `seq2seq.prefix` before each source; several a row with packing.

    Both sides are tokenised once into the cache, each with the tokenizer's EOS at its end.

    Raises:
      UserError: no such data, records without the two texts (with `file:line`), or a tokenizer without EOS.
    """
    if data.format not in ('auto', 'pair'):
        raise UserError(f'data.format={data.format!r}: expected auto or pair for objective=seq2seq')
    key = f'data.{split}'
    columns = _columns(data)
    records = holdout.part(open_records(data.path(split), holdout.key_of(data, split), columns), data, split)
    identity = [records.identity, tokenizers.fingerprint(tokenizer), list(columns), settings.prefix]
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    once(
        lambda: all((folder / side / 'meta.json').is_file() for side in ('source', 'target')),
        lambda: _tokenise(records, folder, tokenizer, data, settings.prefix, key),
        key,
    )
    place = lambda number: next(itertools.islice((place for place, _ in records), number, None))  # noqa: E731
    source, target = (
        check_rows(Tokens.open(folder / side), tokenizer, data.vocab_size, place) for side in ('source', 'target')
    )
    target_len = data.target_len or data.seq_len
    pairs = Pairs(source, target, tokenizer.eos_token_id, data.seq_len, target_len, data.packing)
    for name, cut, length in (('source', pairs.cut_sources, 'seq_len'), ('target', pairs.cut_targets, 'target_len')):
        if cut:
            console.note(
                f'{records.name}: {cut:,} of {source.documents:,} {name}s are longer than data.{length} and cut'
            )
    return pairs


def _columns(data: DataSpec) -> dict[str, str]:
    return {data.source_key: 'data.source_key', data.target_key: 'data.target_key'}


RECORDS = holdout.Recordwise(
    'pairs',
    lambda data, key: open_records(data.path('train'), key, _columns(data)),
    lambda data, record: [record.get(name) for name in _columns(data)] if isinstance(record, dict) else record,
)


def _tokenise(records: Records, folder: pathlib.Path, tokenizer: Any, data: DataSpec, prefix: str, key: str) -> None:
    count = sum(1 for _ in records)
    if not count:
        raise UserError(f'{records.name}: the data is empty; expected at least one pair')
    source, target = (TokenWriter(folder / side, tokenizer, True, records.name) for side in ('source', 'target'))
    with console.progress(count, f'tokenise {key}', 'pair') as bar, target, source:
        for place, record in records:
            source.add(prefix + field(record, place, data.source_key, 'data.source_key'))
            target.add(field(record, place, data.target_key, 'data.target_key'))
            bar.advance(1)


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed negative log-likelihood of the targets in nats, their number, and sums for `summarise`."""
    hidden, targets, weights = seq2seq_batch.decode(model, params, batch, rng)
    nll, sums = score(hidden, model.head(params), targets, weights, batch['target_segment_ids'], rng)
    return nll, weights.sum(), sums


class Pairs:
    """Rows of pairs of texts by number.

    A source that is too long is cut before its EOS. A target that is too long has none: it does not end there.
    """

    def __init__(self, source: Tokens, target: Tokens, eos: int, seq_len: int, target_len: int, packing: bool) -> None:
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


OBJECTIVE = Objective(
    name='seq2seq',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('encdec',),
    summarise=summarise,
    prompt_tokens=0,
    auto_class='Seq2SeqLM',
)
