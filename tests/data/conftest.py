"""Tokens in memory, and full recipes of a few keys."""

import numpy as np
import pytest
from hypothesis import settings

from jaxtune.data.tokens import Tokens
from jaxtune.recipe import recipes

# A deadline measures the machine, not the code.
settings.register_profile('jaxtune', deadline=None)
settings.load_profile('jaxtune')


def tokens_of(lengths):
    """Documents of the given lengths whose ids count 1, 2, 3 … through the whole stream."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Tokens(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, int(offsets[-1]), int(offsets[-1]) + 1)


@pytest.fixture
def recipe():
    """`recipe(**{'data.train': ...})`: the defaults with changes laid over."""

    def make(changes):
        config = recipes.defaults()
        recipes.apply_overrides(config, changes)
        return config

    return make
