"""A bar cut into slices, with what each is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Slice:
    """A piece of a bar.

    Attributes:
      words: what it is.
      color: of the style sheet.
      amount: in words.
      share: of the whole bar.
      percent: the share in words.
    """

    words: str
    color: str
    amount: str
    share: float
    percent: str


def percent(value: float) -> str:
    """A share as `5.0 %` or `50 %`."""
    return f'{100 * value:.1f} %' if 0 < abs(value) < 0.0995 else f'{100 * value:.0f} %'


def cut(words: str, color: str, amount: str, share: float) -> Slice:
    """A slice of so large a share."""
    return Slice(words, color, amount, share, percent(share))
