"""Sequence classification: one label for a text, or for a pair of texts (BERT, Devlin et al. 2018, arXiv:1810.04805).

Records are `{"text", "label"}` or `{"text1", "text2", "label"}`; a label is a name or an integer.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxtune.common import hub
from jaxtune.common.settings import Settings
from jaxtune.data import holdout
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.packing import Row
from jaxtune.data.records import field, open_records
from jaxtune.data.spec import DataSpec
from jaxtune.errors import UserError
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Sums
from jaxtune.objectives.cross_entropy import cross_entropy

_BATCH = 4096  # texts that are tokenised together


def batch_spec(settings: Settings, data: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: `labels` and `loss_mask` are one number each."""
    fields = dict.fromkeys(('tokens', 'positions', 'segment_ids', 'token_types'), ((data.seq_len,), np.int32))
    fields |= {'labels': ((), np.int32), 'loss_mask': ((), np.float32)}
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in fields.items()}


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> 'Examples':
    """One example a row, cut to `data.seq_len` tokens.

    Raises:
      UserError: `file:line` of a record that is not one, or whose label is unknown.
    """
    return Examples(data, split, tokenizer, Labels.of(data))


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed negative log-likelihood of the labels in nats, their number, and how many were predicted right."""
    outputs = model.apply(params, batch, rng=rng)
    labels, weights = batch['labels'][:, None], batch['loss_mask'][:, None]
    nll, correct = cross_entropy(outputs.hidden, model.head(params), labels, weights)
    return nll, batch['loss_mask'].sum(), {'accuracy': correct}


def label_fields(settings: Settings, data: DataSpec) -> dict[str, dict]:
    """Hugging Face's config fields that name the labels.

    Raises:
      UserError: there are no labels.
    """
    names = Labels.of(data).names
    return {
        'id2label': {str(number): name for number, name in enumerate(names)},
        'label2id': {name: number for number, name in enumerate(names)},
    }


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a recipe: the model folder's own where they cover those of `data.train`, else those.

    Attributes:
      names: in the order of their numbers; names sorted, integers by size.
      numbered: an integer in the data is a label's number, not its name.
    """

    names: tuple[str, ...]
    numbered: bool = False

    @classmethod
    def of(cls, data: DataSpec) -> 'Labels':
        """The labels of a recipe.

        Raises:
          UserError: neither data nor model name any.
        """
        known = _folder_names(data.labels_of) if data.labels_of else ()
        data = data.whole or data
        if sources := data.sources('train'):
            labels = {label for one in sources for _, _, label in _read(data.of('train', one), 'train', both=True)}
            names = tuple(map(str, sorted(labels, key=lambda label: (isinstance(label, str), label))))
            if not set(names) <= set(known):
                ids = all(isinstance(label, int) and 0 <= label < len(known) for label in labels)
                return cls(known, True) if ids and known else cls(names)
        elif not known:
            known = data.default_labels
        if not known:
            raise UserError(
                f'model.path={data.labels_of!r}: its config.json names no labels (id2label); expected a classifier, '
                'or data.train with labels'
            )
        return cls(known, not any(name.isdigit() for name in known))

    def number(self, label: str | int, place: str) -> int:
        """The number of a record's label.

        Raises:
          UserError: it is none of the labels.
        """
        if self.numbered and isinstance(label, int) and 0 <= label < len(self.names):
            return label
        try:
            return self.names.index(str(label))
        except ValueError:
            shown = ', '.join(self.names[:5]) + (', …' if len(self.names) > 5 else '')
            raise UserError(
                f'{place}: label {label!r:.60}: expected one of the {len(self.names)} labels {shown}'
            ) from None


def _folder_names(path: str) -> tuple[str, ...]:
    """What a classifier's folder (or a workdir's `export/`) calls its labels."""
    folder = pathlib.Path(path)
    folder = folder / 'export' if (folder / 'export' / 'config.json').is_file() else hub.resolve(path)
    try:
        names = json.loads((folder / 'config.json').read_text('utf-8')).get('id2label') or {}
        return tuple(names[number] for number in sorted(names, key=int))
    except (OSError, ValueError, AttributeError):
        return ()  # opening the model says what is wrong with it


RECORDS = holdout.Recordwise(
    'labelled texts',
    lambda data, key: open_records(data.path('train'), key),
    lambda data, record: (
        [record.get(name) for name in ('text1', 'text2', data.text_key)] if isinstance(record, dict) else record
    ),
)


def _read(data: DataSpec, split: str, both: bool = False) -> Iterator[tuple[str, tuple[str, ...], str | int]]:
    """`(place, texts, label)` of every record of a split; with `both`, of those held out of it too."""
    records = open_records(data.path(split), holdout.key_of(data, split))
    for place, record in records if both else holdout.part(records, data, split):
        if isinstance(record, dict) and 'text1' in record:
            texts = (field(record, place, 'text1'), field(record, place, 'text2'))
        else:
            texts = (field(record, place, data.text_key, 'data.text_key'),)
        yield place, texts, field(record, place, 'label', kind=(str, int))


class Examples:
    """Rows by number, for `grain.MapDataset.source`; all of them are tokenised at the start and kept in memory.

    Args:
      data: where they are.
      split: `train` or `eval`.
      tokenizer: which encodes a text, or a pair, with its own special tokens.
      labels: of the recipe.

    Raises:
      UserError: as for `dataset`.
    """

    def __init__(self, data: DataSpec, split: str, tokenizer: Any, labels: Labels) -> None:
        self.seq_len = data.seq_len
        self.examples: list[tuple[np.ndarray, np.ndarray, int]] = []
        records = _read(data, split)
        while chunk := list(itertools.islice(records, _BATCH)):
            if len({len(texts) for _, texts, _ in chunk}) > 1:
                first = next(place for place, texts, _ in chunk if len(texts) != len(chunk[0][1]))
                raise UserError(f'{first}: expected one text in every record, or two in every record')
            columns = [list(column) for column in zip(*(texts for _, texts, _ in chunk), strict=True)]
            encoded = tokenizer(*columns, truncation=True, max_length=self.seq_len, return_token_type_ids=True)
            for ids, (place, _, _) in zip(encoded['input_ids'], chunk, strict=True):
                if data.vocab_size and max(ids, default=0) >= data.vocab_size:
                    raise UserError(f'{place}: {tokenizers.no_row(tokenizer, max(ids), data.vocab_size)}')
            pairs = zip(encoded['input_ids'], encoded['token_type_ids'], strict=True)
            for (place, _, label), (ids, its_types) in zip(chunk, pairs, strict=True):
                if not ids:
                    raise UserError(f'{place}: expected a text of at least one token')
                number = labels.number(label, place)
                self.examples.append((np.asarray(ids, np.int32), np.asarray(its_types, np.int32), number))
        backend = getattr(tokenizer, 'backend_tokenizer', None)
        if backend is not None:
            backend.no_truncation()  # which would be saved with it

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        ids, types, label = self.examples[index]
        row = {name: np.zeros(self.seq_len, np.int32) for name in ('tokens', 'positions', 'segment_ids', 'token_types')}
        size = len(ids)
        row['tokens'][:size], row['token_types'][:size] = ids, types
        row['positions'][:size], row['segment_ids'][:size] = np.arange(size), 1
        return row | {'labels': np.asarray(label, np.int32), 'loss_mask': np.ones((), np.float32)}


OBJECTIVE = Objective(
    name='classification',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('encoder',),
    head='classification',
    label_fields=label_fields,
    auto_class='SequenceClassification',
)
