"""Which answers are learnt from, and what long ones cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.rl.selection import Selection, soft_overlong


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), buffer=st.integers(1, 50))
def test_the_soft_penalty_is_trls(lengths, buffer):
    trl = pytest.importorskip('trl.rewards')
    theirs = trl.get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=buffer)
    ours = soft_overlong(np.asarray(lengths), 50, buffer)
    np.testing.assert_allclose(-ours, theirs(completion_ids=[[1] * length for length in lengths]), atol=1e-6)


def test_what_is_learnt_from():
    scores, ended = np.asarray([1, 1, 0, 1, 2, 2], np.float32), np.asarray([1, 1, 1, 0, 1, 0], bool)
    assert Selection(2).learnt(scores, ended).all()
    assert Selection(2, skip_equal=True).learnt(scores, ended).tolist() == [False, False, True, True, False, False]
    assert Selection(2, overlong='mask').learnt(scores, ended).tolist() == ended.tolist()
    both = Selection(2, skip_equal=True, overlong='mask').learnt(scores, ended)
    assert both.tolist() == [False, False, True, False, False, False]
    assert not Selection().equal(scores).any()  # without groups


def test_penalties_add_up():
    selection = Selection(overlong='soft', longest=10, missing_eos_penalty=0.5)  # the last fifth: 8 and on
    found = selection.penalties(np.asarray([8, 9, 10, 10]), np.asarray([True, True, True, False]))
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.5])
    assert found.dtype == np.float32
