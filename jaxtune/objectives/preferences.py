"""What objectives over preference pairs share: rows of two answers, and the forward pass over both."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.data import formats
from jaxtune.data.chat_encoder import Encoded
from jaxtune.data.examples import Examples, Source, encode_all, pieces, recordwise
from jaxtune.data.packing import Row
from jaxtune.data.spec import DataSpec
from jaxtune.errors import UserError
from jaxtune.objectives import Batch, completion_mask

SIDES = ('chosen', 'rejected')
RECORDS = recordwise('preferences', ('preference',))
_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32))


def make_row(seq_len: int, sides: tuple[str, ...] = SIDES) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds.

    For each side its tokens `[seq_len]`, `{side}_start` and `{side}_end`, between which the answer lies, and
    `{side}_weight`, the record's, 0 where the row has no such side; and the pair's `margin`.
    """
    fields: dict[str, tuple[tuple[int, ...], Any]] = {'margin': ((), np.float32)}
    for side in sides:
        fields |= {side: ((seq_len,), np.int32), f'{side}_weight': ((), np.float32)}
        fields |= {f'{side}_start': ((), np.int32), f'{side}_end': ((), np.int32)}
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in fields.items()}


class Pairs:
    """Pairs by number as rows, for `grain.MapDataset.source`.

    Args:
      examples: two a pair, the chosen one first, an empty one where there is none; `margin` among their arrays.
      seq_len: length of a row.
      mismatched: each row has a third side too, its prompt with the next pair's answer.
    """

    def __init__(self, examples: Examples, seq_len: int, mismatched: bool = False) -> None:
        self.examples, self.seq_len, self.mismatched = examples, seq_len, mismatched
        self.sides = (*SIDES, 'mismatched') if mismatched else SIDES
        self.more: dict[str, np.ndarray] = {}  # further fields by name, `[pairs]`
        lengths = np.diff(examples.offsets).reshape(-1, 2)
        both = lengths[(lengths > 0).all(1)]
        self.facts = {'pairs': len(self), 'tokens': len(examples.ids)}
        longer = np.where(both[:, 0] == both[:, 1], 0.5, both[:, 0] > both[:, 1])
        self.baselines = {'longer_is_better': float(longer.mean())} if len(both) else {}

    def __len__(self) -> int:
        return len(self.examples) // 2

    def __getitem__(self, index: int) -> Row:
        index = int(index)
        row = {name: np.zeros(spec.shape, spec.dtype) for name, spec in make_row(self.seq_len, self.sides).items()}
        row['margin'] += self.examples.extra['margin'][index]
        for number, side in enumerate(SIDES):
            example = self.examples[2 * index + number]
            if len(example.ids):
                start = _start(example)
                self._fill(row, side, example.ids, start, example.assistant_mask[start])
        if self.mismatched:
            prompt, start = self._some(index)
            answer, answer_start = self._some((index + 1) % len(self))
            ids = np.concatenate([prompt[:start], answer[answer_start:]])[: self.seq_len]
            self._fill(row, 'mismatched', ids, start, 1.0)
        return row | {name: np.asarray(values[index]) for name, values in self.more.items()}

    def _some(self, index: int) -> tuple[np.ndarray, int]:
        """Ids of a pair's chosen side, or its only one, and where the answer begins."""
        example = next(example for number in (0, 1) if len((example := self.examples[2 * index + number]).ids))
        return example.ids, _start(example)

    def _fill(self, row: Row, side: str, ids: np.ndarray, start: int, weight: float) -> None:
        row[side][: len(ids)] = ids
        row[f'{side}_start'] += start
        row[f'{side}_end'] += len(ids)
        row[f'{side}_weight'] += weight


def _start(example: Encoded) -> int:
    """Where the answer begins."""
    return int(np.flatnonzero(example.assistant_mask)[0])


def dataset(
    data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path, unpaired: bool = False, mismatched: bool = False
) -> Pairs:
    """Pairs of `data.train` or `data.eval`, each answer after its prompt cut to `data.seq_len` tokens.

    Pairs of equal answers, and those of which cutting leaves nothing to tell apart, are left out and counted.

    Raises:
      UserError: no such data, records that are no pairs (with `file:line` and a count), a template that fails.
    """
    source = Source(data, split, tokenizer, ('preference',))

    def build() -> Examples:
        pairs = formats.read(source.records, formats.preference, source.records.name)
        single = [place for place, pair in pairs if pair.chosen is None or pair.rejected is None]
        if single and not unpaired:
            raise UserError(
                f"{single[0]}: expected the fields 'chosen' and 'rejected'; found an answer with a label, which only "
                f'dpo.loss=kto learns from ({len(single):,} of {len(pairs):,} records are like this)'
            )
        return _encode(data.seq_len, source, pairs, f'tokenise data.{split}')

    settings = ['preference', data.seq_len, unpaired]
    examples = source.cached(cache, f'data.{split}', settings, build)
    return Pairs(examples, data.seq_len, mismatched)


def _encode(seq_len: int, source: Source, pairs: list[tuple[str, formats.Preference]], title: str) -> Examples:
    encode, chats = source.encoder('last'), []
    same = [place for place, pair in pairs if pair.chosen == pair.rejected]
    pairs = [(place, pair) for place, pair in pairs if pair.chosen != pair.rejected]
    for place, pair in pairs:
        chats += [(place, source.prepared(chat)) for chat in (pair.chosen, pair.rejected) if chat is not None]
    if not chats:
        raise UserError(
            f'{same[0]}: chosen and rejected are the same, here and in all {len(same):,} records; expected two answers'
        )
    encoded, notes = encode_all(chats, encode, seq_len, title)
    encodings, kept, margins, alike, without = iter(encoded), [], [], [], 0
    for place, pair in pairs:
        sides = [None if chat is None else next(iter(next(encodings)), None) for chat in (pair.chosen, pair.rejected)]
        wanted = sum(chat is not None for chat in (pair.chosen, pair.rejected))
        ids = [side.ids for side in sides if side is not None]
        if len(ids) < wanted:
            without += 1
            continue
        if wanted == 2 and np.array_equal(ids[0], ids[1]):
            alike.append(place)
            continue
        kept += [_NOTHING if side is None else side for side in sides]
        margins.append(pair.margin)
    before = [place for place, pair in pairs if pair.chosen and pair.rejected and _prompts_differ(pair)]
    if before:
        notes.append(
            f'{len(before):,} pairs differ before their last answers, which alone are compared, first {before[0]}'
        )
    if same:
        notes.append(f'{len(same):,} pairs are left out: chosen and rejected are the same, first {same[0]}')
    if alike:
        notes.append(
            f'{len(alike):,} pairs are left out: chosen and rejected are the same in the first '
            f'data.seq_len={seq_len} tokens, first {alike[0]}'
        )
    if not kept:
        raise UserError(
            f'{(alike or [pairs[0][0]])[0]}: data.seq_len={seq_len} leaves no pair whose answers differ; '
            'expected a larger one'
        )
    return Examples.of(kept, {'margin': np.asarray(margins, np.float32)}, notes)


def _prompts_differ(pair: formats.Preference) -> bool:
    assert pair.chosen is not None
    assert pair.rejected is not None
    return pair.chosen.turns[:-1] != pair.rejected.turns[:-1]


def stacked(batch: Batch, sides: tuple[str, ...]) -> dict[str, jax.Array]:
    """All sides of a batch as rows of a model's batch (`answer_rows.inputs`): a pair's answers are neighbours."""

    def stack(suffix: str) -> jax.Array:
        values = jnp.stack([batch[side + suffix] for side in sides], axis=1)
        return values.reshape(-1, *values.shape[2:])

    return completion_mask.inputs(stack(''), stack('_start'), stack('_end'))


def preview(rows: Pairs, tokenizer: Any) -> list[tuple[str, bool]]:
    """The first pair as text: each answer stands out after its prompt."""
    shown: list[tuple[str, bool]] = []
    for number, side in enumerate(SIDES):
        example = rows.examples[number]
        if len(example.ids):
            shown += [(f'[{side}] ', False), *pieces(tokenizer, example.ids, example.assistant_mask), ('\n', False)]
    return shown
