"""Mixtures: which source each row of training comes from, by weight, as a pure function of the seed and its number."""

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np

from jaxtune.errors import UserError

LARGEST = 1 << 20  # rows after which the order of the sources repeats, at most


class Mixture:
    """Rows of several sources.

    Row n of training is the next one of the source that `source_order` names; each source follows its own passes, each
    in an order of its own. Nothing is drawn and nothing is counted up from the start, so any row can be read by its
    number alone: on any number of hosts, and after any interruption, rows are the same.

    Args:
      parts: label -> numbered rows, each `{field: array}` of the same fields and shapes.
      weights: label -> its part of the rows, beside the others'; those of held-out data mean nothing.

    Raises:
      UserError: a source has no rows, or too small a part.
    """

    def __init__(self, parts: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        for label, rows in self.parts.items():
            if not len(rows):
                raise UserError(f'data.train, data.eval: the source {label!r} gives no rows; expected at least one')
        self.counts = whole_weights({label: weights[label] for label in self.parts})
        self.order = source_order(list(self.counts.values()))
        # How many rows of its source stand before each row of a period.
        self.before = np.zeros(len(self.order), np.int64)
        for number, count in enumerate(self.counts.values()):
            self.before[self.order == number] = np.arange(count)

    def __len__(self) -> int:
        """Rows of all sources together, which is what an epoch of the mixture has."""
        return sum(map(len, self.parts.values()))

    @property
    def shares(self) -> dict[str, Fraction]:
        """Label -> its share of the rows, exactly."""
        return {label: Fraction(count, len(self.order)) for label, count in self.counts.items()}

    def find(self, row: int) -> tuple[str, int]:
        """Where a row of training comes from: a label, and the number of its source's row, through all its passes."""
        period, at = divmod(row, len(self.order))
        label = list(self.parts)[self.order[at]]
        return label, period * self.counts[label] + int(self.before[at])

    def taken(self, rows: int) -> dict[str, int]:
        """Label -> how many of the first rows of training are its own."""
        periods, rest = divmod(rows, len(self.order))
        inside = np.bincount(self.order[:rest], minlength=len(self.counts))
        return {label: periods * self.counts[label] + int(n) for label, n in zip(self.counts, inside, strict=True)}

    def epochs(self, rows: int) -> dict[str, float]:
        """Label -> how often its source is passed over in the first rows of training."""
        return {label: taken / len(self.parts[label]) for label, taken in self.taken(rows).items()}

    def shuffled(self, seed: int) -> 'ShuffledMixture':
        """Its rows in training's order, without end."""
        return ShuffledMixture(self, seed)


class ShuffledMixture:
    """Rows of training by number; see `Mixture`. The order of a source depends on the seed and its label alone."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self.mixture = mixture
        self.passes = {label: passes(rows, (seed, *label.encode())) for label, rows in mixture.parts.items()}

    def __getitem__(self, row: int) -> Any:
        label, number = self.mixture.find(row)
        return self.passes[label][number]


def passes(rows: Any, seed: int | tuple[int, ...]) -> Any:
    """Passes over rows that follow each other without a gap and without end, each in an order of its own.

    Args:
      rows: a `grain.MapDataset`, or whatever can be its source.
      seed: of the orders; several numbers are one seed.
    """
    dataset = rows if isinstance(rows, grain.MapDataset) else grain.MapDataset.source(rows)
    # Grain adds the number of the pass to the seed; mixed first, neighbouring seeds do not share their passes.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return dataset.shuffle(seed=mixed).repeat()


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as whole numbers in the same proportions, as small as can be: `{0.7, 0.2, 0.1}` is `{7, 2, 1}`.

    A decimal number means what it reads as. Where the sum would exceed `LARGEST`, they are the nearest of that sum.

    Raises:
      UserError: one is less than a `LARGEST`th of all.
    """
    exact = {label: Fraction(repr(float(weight))) for label, weight in weights.items()}
    total = sum(exact.values())
    shares = {label: weight / total for label, weight in exact.items()}
    size = math.lcm(*(share.denominator for share in shares.values()))
    if size > LARGEST:
        size = LARGEST
        whole = {label: math.floor(share * size) for label, share in shares.items()}
        by_rest = sorted(shares, key=lambda label: whole[label] - shares[label] * size)
        for label in by_rest[: size - sum(whole.values())]:
            whole[label] += 1
        shares = {label: Fraction(count, size) for label, count in whole.items()}
    for label, share in shares.items():
        if not share:
            raise UserError(
                f'data.train.{label}.weight={weights[label]:g}: less than a {LARGEST:,}th of all weights; expected more'
            )
    return {label: int(share * size) for label, share in shares.items()}


def source_order(counts: Sequence[int]) -> np.ndarray:
    """Which source each row of a period comes from, so that at every row each source has its exact share so far.

    With D = sum of the counts, row m (1, 2, … a) of a source of count a has a window of places to come at, from
    `floor((m-1) D/a) + 1` to `ceil(m D/a)`. At each place, of the sources whose window has begun, the one whose window
    ends first has its next row (Tijdeman 1980, The chairman assignment problem; Baruah et al. 1996, Pfair scheduling).

    All windows are kept: of one source, those inside the places s+1..t have m-1 >= s a/D and m <= t a/D and are at most
    (t-s) a/D; of all sources at most t-s. So no stretch holds more windows than places, and then the earliest deadline
    meets all. Hence after n rows a source has at least the rows whose windows are over, floor(n a/D), and at most those
    whose windows have begun, ceil(n a/D): never a whole row off its share n a/D, and exact after every period.

    Args:
      counts: rows of each source in a period, at least 1.

    Returns:
      `[D]` numbers of sources.
    """
    size = sum(counts)
    order = np.zeros(size, np.min_scalar_type(len(counts)))
    taken = [0] * len(counts)
    later = [(1, number) for number in range(len(counts))]  # (first place of its next row, source)
    ready: list[tuple[int, int]] = []  # (last place of its next row, source)
    for place in range(1, size + 1):
        while later and later[0][0] <= place:
            number = heapq.heappop(later)[1]
            heapq.heappush(ready, (-(-(taken[number] + 1) * size // counts[number]), number))
        number = heapq.heappop(ready)[1]
        order[place - 1] = number
        taken[number] += 1
        if taken[number] < counts[number]:
            heapq.heappush(later, (taken[number] * size // counts[number] + 1, number))
    return order
