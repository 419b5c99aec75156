"""Where answers lie in rows: how many rows, how long, and what of each answer is where.

Answers to one prompt may share its tokens (`shared_rows`): the prompt stands once, as a segment that all segments of
its row see, and the answers after it, each with a copy of the prompt's last token, which its first one is predicted at.
Their positions are those that they have alone, so that the forward pass says the same of them.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxtune.data.packing import pack

_TILE = 128  # lengths of rows are multiples, as the tiles of attention are
_SHARED_TILE = 32  # of rows with shared prompts, which those tiles cannot attend in


class Layout(NamedTuple):
    """Answers in rows.

    Attributes:
      shape: rows and their length.
      row: `[answers]`, which row each is in.
      at: `[answers]`, where in the row its prompt's first token is, or would be.
      segment: `[answers]`, its segment, from 1 in each row.
      first: `[answers]`, the first token of prompt and answer that its segment has.
      shared: `(rows, answers)`: the rows that begin with the tokens before `first` of an answer, which all see.
    """

    shape: tuple[int, int]
    row: np.ndarray
    at: np.ndarray
    segment: np.ndarray
    first: np.ndarray
    shared: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def places(self) -> int:
        """How many there are in all rows."""
        return self.shape[0] * self.shape[1]


def separate_rows(end: np.ndarray, longest: int, packing: bool, unit: int, parts: int) -> Layout:
    """Each answer with its own prompt; rows as short as they may be, longer ones only where that saves a tenth.

    Args:
      end: `[answers]`, tokens of each with its prompt.
      longest: tokens of a row at most.
      packing: several share a row.
      unit: see `few_rows`.
      parts: devices that divide a row.
    """
    found = None
    for size in row_lengths(longest, parts):
        if size < end.max():
            continue
        row = pack(end, size) if packing else np.arange(len(end))
        shape = (few_rows(int(row.max()) + 1, len(end), unit), size)
        if found is None or shape[0] * shape[1] < 0.9 * found[0][0] * found[0][1]:
            found = shape, row
    assert found is not None  # no answer is longer than `longest`
    shape, row = found
    at, segment = _one_after_another(row, end)
    return Layout(shape, row, at, segment, np.zeros_like(end))


def shared_rows(prompts: list[bytes], start: np.ndarray, end: np.ndarray, unit: int, parts: int) -> Layout:
    """Answers to equal prompts share its tokens, as many of them a row as make the fewest places in all.

    Args:
      prompts: of each answer; those to equal ones may share a row.
      start: `[answers]`, tokens of its prompt.
      end: `[answers]`, tokens of prompt and answer.
      unit: see `few_rows`.
      parts: devices that divide a row.
    """
    groups: dict[bytes, list[int]] = {}
    for answer, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(answer)
    own, found = end - start + 1, None
    for most in range(1, max(len(group) for group in groups.values()) + 1):
        cut = [part for group in groups.values() for part in _even(group, own, -(-len(group) // most))]
        length = max(int(start[part[0]]) - 1 + int(own[part].sum()) for part in cut)
        shape = (few_rows(len(cut), len(end), unit), _rounded(length, parts))
        if found is None or shape[0] * shape[1] < 0.9 * found[0][0] * found[0][1]:
            found = shape, cut
    assert found is not None  # a group has one answer at least
    shape, cut = found
    row = np.zeros_like(end)
    for number, part in enumerate(cut):
        row[part] = number
    at, segment = _one_after_another(row, own)
    firsts = np.asarray([part[0] for part in cut])
    # Behind the tokens that are shared: it is as if the own ones of the first answer went on after them.
    return Layout(shape, row, at, segment, start - 1, (np.arange(len(cut)), firsts))


def _even(group: list[int], sizes: np.ndarray, count: int) -> list[list[int]]:
    """A group in so many parts of nearly equal sizes: the longest first, each to the shortest part so far."""
    parts: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for answer in sorted(group, key=lambda answer: (-sizes[answer], answer)):
        least = totals.index(min(totals))
        parts[least].append(answer)
        totals[least] += int(sizes[answer])
    return [part for part in parts if part]


def _one_after_another(row: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each begins in its row, and its number there, from 1."""
    order = np.argsort(row, kind='stable')
    before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
    first = np.searchsorted(row[order], row[order])  # where each one's row begins in the order
    at, segment = np.empty_like(before), np.empty_like(before)
    at[order], segment[order] = before - before[first], np.arange(len(order)) - first + 1
    return at, segment


def few(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16 … that is not less."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


def few_rows(needed: int, answers: int, unit: int) -> int:
    """A number of rows of which there are few: `unit` times one of `few`, or what all answers alone would need."""
    return unit * min(few(-(-needed // unit)), -(-answers // unit))


def row_lengths(longest: int, parts: int = 1) -> list[int]:
    """The lengths that rows may have: at most eight, so that few shapes are compiled, the shortest first.

    Args:
      longest: which is one of them.
      parts: devices that divide a row.
    """
    unit = math.lcm(_TILE, parts) * max(1, longest // (16 * math.lcm(_TILE, parts)))
    return [*[unit * times for times in (1, 2, 3, 4, 6, 8, 12) if unit * times < longest], longest]


def _rounded(length: int, parts: int) -> int:
    """The length of a row with shared prompts: few of them, and at most a sixteenth longer, or a tile."""
    tile = math.lcm(_SHARED_TILE, parts)
    step = max(tile, tile * ((1 << (length.bit_length() - 1)) // 16 // tile))
    return -(-length // step) * step


def scored_count(length: int, most: int, parts: int = 1) -> int:
    """For how many places of a row of `length` there is room, where none has more than `most` that are scored.

    Sixteenths of the row times 1, 2, 3, 4, 6, 8, 12 or 16, so that few shapes are compiled; a multiple of `parts`.
    """
    unit = -(-length // (16 * parts)) * parts
    return min(length, unit * few(max(1, -(-most // unit))))


def scored_places(mask: np.ndarray, parts: int = 1) -> np.ndarray:
    """Where each row's scored tokens are predicted, `[rows, scored_count]` int32, rising; `length` fills up.

    Args:
      mask: `[rows, length]`, 0 where nothing is scored.
      parts: devices that divide a row.
    """
    counts, length = np.count_nonzero(mask, axis=1), mask.shape[1]
    places = np.full((len(mask), scored_count(length, int(counts.max()), parts)), length, np.int32)
    of, at = np.nonzero(mask)
    places[of, spans(counts)[1]] = at
    return places


def spans(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(which, place)` of everything in spans of these sizes, one after the other."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
