"""Cutting texts in two for an encoder-decoder: spans hidden behind sentinels, or an end to be continued.

Everything here is a pure function of numbers: lengths of lengths, and a row's cut of a seed and the row's number.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# The last sentinels tell a mixture's model which denoiser cut a row: its text, spans that are few, or many, or long.
MODES = ('regular', 'sequential', 'extreme')


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to cut a text.

    Attributes:
      density: share of the tokens that go to the target.
      mean_length: of the spans they are in; 0 = one span at the end.
      random_end: with one span at the end, it begins anywhere, all places being as likely.
      mode: name in `MODES` that the input begins with, or ''.
    """

    density: float
    mean_length: float
    random_end: bool = False
    mode: str = ''

    def counts(self, length: int) -> tuple[int, int]:
        """`(noise, spans)`: how many of `length` tokens go to the target (at most, if `random_end`), in how many spans.

        Where there are two tokens, each side gets at least one, and so does every span.
        """
        if length < 2:
            return 0, 0
        if self.random_end:
            return length - 1, 0
        # Half to even, as the published preprocessing (float32) rounds.
        noise = int(np.round(np.float32(length) * np.float32(self.density)))
        noise = min(max(noise, 1), length - 1)
        if not self.mean_length:
            return noise, 0
        spans = int(np.round(np.float32(noise) / np.float32(self.mean_length)))
        return noise, min(max(spans, 1), noise, length - noise)

    def lengths(self, length: int) -> tuple[int, int]:
        """Tokens of the input and of the target that `length` tokens make, EOS included; the most they can be."""
        noise, spans = self.counts(length)
        kept = length - (1 if self.random_end and length > 1 else noise)
        return kept + spans + 1 + bool(self.mode), noise + spans + 1

    def raw_length(self, input_length: int) -> int:
        """The most tokens whose input fits into `input_length` (T5's `random_spans_helper`)."""
        length = 1
        while self.lengths(length + 1)[0] <= input_length:
            length += 1
        return length

    def mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Which tokens go to the target, bool `[length]`.

        T5's `random_spans_noise_mask`: noise and the rest are cut into equally many spans, all ways to do so being as
        likely, and alternate, the rest first.
        """
        noise, spans = self.counts(length)
        if not noise:
            return np.zeros(length, bool)
        if self.random_end:
            return np.arange(length) >= rng.integers(1, length)
        if not spans:
            return np.arange(length) >= length - noise
        sizes = np.stack([_segments(length - noise, spans, rng), _segments(noise, spans, rng)], axis=1)
        return np.repeat(np.tile([False, True], spans), sizes.reshape(-1))

    def cut(
        self, tokens: np.ndarray, rng: np.random.Generator, sentinels: Sequence[int], eos: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Input and target of a text.

        Args:
          tokens: `[length]`.
          rng: what draws the spans.
          sentinels: ids that stand for the spans in order; the last ones are the modes'.
          eos: ends both.

        Returns:
          `(input, target)`: the text with each span's sentinel in its place; each span after its sentinel.
        """
        mask = self.mask(len(tokens), rng)
        start = [sentinels[-1 - MODES.index(self.mode)]] if self.mode else []
        if not self.mean_length:
            return _join(start, tokens[~mask], eos), _join([], tokens[mask], eos)
        first = mask & ~np.concatenate([[False], mask[:-1]])
        names = np.asarray(sentinels, tokens.dtype)[: np.count_nonzero(first)]
        replaced = np.where(mask, 0, tokens)
        replaced[first] = names
        places = np.flatnonzero(first)
        target = np.insert(tokens, places, names)
        hidden = np.insert(mask, places, True)
        return _join(start, replaced[~mask | first], eos), _join([], target[hidden], eos)


def _segments(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes of `parts` pieces of `items`, each at least 1, every way to cut being as likely."""
    edges = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], edges, [items]]))


def _join(start: list[int], tokens: np.ndarray, eos: int) -> np.ndarray:
    return np.concatenate([start, tokens, [eos]]).astype(np.int32)


def denoisers(mode: str, density: float, mean_length: float) -> tuple[Denoiser, ...]:
    """The denoisers of a mode, from which each row takes one.

    Args:
      mode: `spans`, T5's span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.3.4); `prefix`, a language
        model that sees the prefix whole (3.2.2); `ul2`, the mixture of seven of table 1 of Tay et al. 2022
        (arXiv:2205.05131), each with a token in front that says of which kind it is.
      density: `spans`: share of the tokens hidden.
      mean_length: `spans`: of the spans they are in.
    """
    if mode == 'spans':
        return (Denoiser(density, mean_length),)
    if mode == 'prefix':
        return (Denoiser(1.0, 0, random_end=True),)
    regular = tuple(Denoiser(0.15, length, mode='regular') for length in (3, 8))
    extreme = ((0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64))
    return (
        *regular,
        Denoiser(0.25, 0, mode='sequential'),
        *(Denoiser(share, length, mode='extreme') for share, length in extreme),
    )
