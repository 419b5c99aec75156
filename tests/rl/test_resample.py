"""Groups without a signal are replaced, in few rounds, by answers of others: a function of the step and the round."""

import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.rl.resample import replaced, resample
from jaxtune.rl.rollouts import Rollouts
from jaxtune.rl.selection import Selection

GROUP = 3


def rollouts(names: list[str]) -> Rollouts:
    numbers = np.asarray([zlib.crc32(name.encode()) % 1000 for name in names], np.int32)
    tokens = np.repeat(numbers[:, None], 4, 1)
    return Rollouts(names, names, tokens, numbers, numbers + 1, numbers > 500, tokens.astype(np.float32))


def draws(chance: float, seed: int):
    """Groups of which some have a signal; the same for the same round."""

    def draw(number: int, groups: int):
        rng = np.random.default_rng([seed, number])
        scores = np.where(rng.random((groups, 1)) < chance, rng.random((groups, GROUP)), 0.5).astype(np.float32)
        return rollouts([f'{number}-{i}' for i in range(groups * GROUP)]), scores.ravel()

    return draw


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), chance=st.sampled_from([0.0, 0.4, 1.0]), rounds=st.integers(0, 4))
def test_what_has_a_signal_stays_and_the_rest_is_replaced_by_what_has_one(seed, chance, rounds):
    selection = Selection(GROUP)
    answers, scores = draws(0.5, seed + 1)(99, 5)
    before, signal = scores.copy(), ~selection.equal(scores)
    asked_of = []

    def draw(number, groups):
        asked_of.append((number, groups))
        return draws(chance, seed)(number, groups)

    found, found_scores, asked = resample(answers, scores, selection, rounds, draw)
    np.testing.assert_array_equal(scores, before)
    assert asked == sum(groups for _, groups in asked_of)
    assert [number for number, _ in asked_of] == list(range(len(asked_of)))
    assert len(asked_of) <= rounds
    assert [groups for _, groups in asked_of[:1]] == [(~signal).sum() // GROUP][: len(asked_of)]
    for place in range(15):
        if signal[place] or found.texts[place] == answers.texts[place]:
            assert found.texts[place] == answers.texts[place]
            assert found_scores[place] == scores[place]
        else:
            number, row = map(int, found.texts[place].split('-'))
            _, theirs = draws(chance, seed)(number, dict(asked_of)[number])
            assert found_scores[place] == theirs[row]
            assert row % GROUP == place % GROUP
    now = ~selection.equal(found_scores)
    assert (now >= signal).all()
    if chance == 1.0 and rounds:
        assert now.all()
    if chance == 0.0:
        assert found.texts == answers.texts
    again = resample(answers, scores, selection, rounds, draws(chance, seed))
    assert again[0].texts == found.texts


def test_every_field_of_an_answer_is_replaced():
    ours, theirs = rollouts(['a', 'b', 'c']), rollouts(['d', 'e'])
    found = replaced(ours, np.asarray([2, 0]), theirs, np.asarray([0, 1]))
    assert found.texts == ['e', 'b', 'd']
    for name in ('tokens', 'start', 'end', 'ended', 'logprobs'):
        own, other = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(getattr(found, name), np.stack([other[1], own[1], other[0]]))
    assert ours.texts == ['a', 'b', 'c']
