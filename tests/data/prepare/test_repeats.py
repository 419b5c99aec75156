"""Substrings that documents share, against the slow way of finding them."""

import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.prepare import shards, substring_dedup, words

LENGTH = 4
_WORD = st.sampled_from(['a', 'B', 'über', '中', 'İ', 'x1'])
_GAP = st.sampled_from([' ', ', ', '\n\n', '. "'])


@st.composite
def texts(draw):
    """Documents of few kinds of words, so that many runs stand in several of them."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        parts = draw(st.lists(st.tuples(_WORD, _GAP), max_size=14))
        found.append(''.join(word + gap for word, gap in parts))
    return found


def cut(documents, tasks, work):
    """What is left of each document, found in so many tasks."""
    numbers = np.array_split(np.arange(len(documents)), tasks)
    for rank, part in enumerate(numbers):
        found = substring_dedup.Windows(LENGTH)
        for number in part.tolist():
            found.add(documents[number], number)
        shards.save_array(work / 'windows' / f'{rank:05d}.npy', found.merged())
    for task in range(substring_dedup.SUBSTRING_TASKS):
        substring_dedup.substrings(work, tasks, task)
    cutter = substring_dedup.Substrings(work, LENGTH)
    return [cutter.cut(text, number) for number, text in enumerate(documents)]


def slowly(documents):
    """The words that stay, by comparing every run with every run before."""
    first, left = {}, []
    for number, text in enumerate(documents):
        found = words.in_place(text)
        stays = [True] * len(found)
        for i in range(len(found) - LENGTH + 1):
            if first.setdefault(tuple(found[i : i + LENGTH]), number) != number:
                stays[i : i + LENGTH] = [False] * LENGTH
        left.append([word for word, stay in zip(found, stays, strict=True) if stay])
    return left


@settings(deadline=None)
@given(texts(), st.integers(1, 3))
def test_what_stays_is_what_no_document_before_holds(documents, tasks):
    with tempfile.TemporaryDirectory() as folder:
        found = cut(documents, tasks, pathlib.Path(folder))
    assert [words.in_place(text) for text in found] == slowly(documents)
    assert found[0] == documents[0]


@pytest.mark.parametrize(
    ('text', 'left'),
    [
        ('So: one two, three four. And then on.', 'So: And then on.'),
        ('He said.\n\nOne; two three\nfour!', 'He said.\n\n'),
        ('one two three five', 'one two three five'),
    ],
)
def test_what_is_left_reads_on(tmp_path, text, left):
    assert cut(['One two three four five.', text], 2, tmp_path) == ['One two three four five.', left]
