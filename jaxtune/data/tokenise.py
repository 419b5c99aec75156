"""Texts as ids, cut so that no token lies across a given place."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


def tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int], cut: bool = False
) -> tuple[list[int], np.ndarray]:
    """Ids of a text, no token of which lies across an edge, and the characters `[tokens, 2]` that each covers.

    Args:
      tokenizer: makes the ids.
      text: the text.
      edges: places in it.
      cut: tokenise what lies between edges by itself even where no token lies across one.
    """
    edges = sorted({edge for edge in edges if 0 < edge < len(text)})
    if cut or not tokenizer.is_fast:
        return _pieces(tokenizer, text, edges)
    ids, covers = _encode(tokenizer, text)
    crossed = [edge for edge in edges if ((covers[:, 0] < edge) & (covers[:, 1] > edge)).any()]
    return _pieces(tokenizer, text, crossed) if crossed else (ids, covers)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], np.ndarray]:
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids, np.tile([[0, len(text)]], (len(ids), 1))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded.offset_mapping, np.int64).reshape(-1, 2)
    # Some tokenizers leave a token's leading space out of its offsets; what no other token covers is its own.
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    before = np.concatenate([[0], ends[:-1]]) if len(offsets) else ends
    starts = np.minimum(offsets[:, 0], before)
    return encoded.input_ids, np.stack([starts, offsets[:, 1]], axis=1)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Each piece between edges by itself, as it would be tokenised after other text."""
    bounds = [0, *edges, len(text)]
    ids: list[int] = []
    covers = []
    for low, high in itertools.pairwise(bounds):
        piece = text[low:high]
        if not piece:
            continue
        new, cover = _encode(tokenizer, piece)
        anchor = _anchor(tokenizer) if low else ''
        if anchor:
            head = len(_encode(tokenizer, anchor)[0])
            joined, joined_cover = _encode(tokenizer, anchor + piece)
            if joined[:head] == _encode(tokenizer, anchor)[0] and (joined_cover[head:, 0] >= len(anchor)).all():
                new, cover = joined[head:], joined_cover[head:] - len(anchor)
        ids += new
        covers.append(cover + low)
    return ids, np.concatenate(covers) if covers else np.zeros((0, 2), np.int64)


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to put before a piece where the tokenizer would begin it with a space of its own; '' where not."""
    first: Any = tokenizer.convert_ids_to_tokens(tokenizer('a', add_special_tokens=False).input_ids[0])
    return '\n' if first.startswith(('▁', 'Ġ')) else ''
