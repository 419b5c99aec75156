"""A slow host of a pod is named, over the connections on which the processes watch each other."""

import threading

import pytest

from jaxtune.parallel import liveness
from jaxtune.parallel.pace import Pace, slow_host


@pytest.mark.parametrize(
    ('seconds', 'update', 'slow'),
    [
        ({0: 0.1, 1: 0.1, 2: 0.1}, 1.0, None),
        ({0: 0.1, 1: 0.3, 2: 0.1}, 1.0, 1),
        ({0: 0.1, 1: 0.15, 2: 0.1}, 1.0, None),  # 5 % of an update
        ({0: 0.5, 1: 0.1}, 1.0, 0),  # of two, the faster one is the median
        ({0: 0.9, 1: 0.9, 2: 0.8}, 1.0, None),  # all of them are
    ],
)
def test_who_is_slow(seconds, update, slow):
    assert slow_host(seconds, update) == slow


def test_it_is_told_after_three_reports_in_a_row_and_once():
    told = []
    pace = Pace(3, 0, 'zero', lambda message: None, told.append)
    for step, slow in enumerate((1, 1, None, 1, 1, 1, 1, 2, 2, None, 2, 2, 2, 1, 1, 1), 1):
        pace.receive(1, 'one', {'pace': [step, 0.25 if slow == 1 else 0.0]})
        pace.report(step, 0.0, 0.5)
        pace.receive(2, 'two', {'pace': [step, 0.25 if slow == 2 else 0.0]})
    assert [line.split(' is')[0] for line in told] == [
        'host one (process 1)',
        'host two (process 2)',
        'host one (process 1)',
    ]
    assert 'slower than the median host by 250 ms an update of 500 ms' in told[0]


def test_reports_that_stay_alone_are_dropped():
    told = []
    pace = Pace(2, 0, 'zero', lambda message: None, told.append)
    for step in range(1, 100):
        pace.report(step, 0.0, 1.0)
    assert len(pace._reports) <= 5
    assert len(pace._updates) <= 5
    assert not told
    for step in (97, 98, 99):
        pace.receive(1, 'one', {'pace': [step, 5.0]})
    assert len(told) == 1


def test_reports_go_to_process_0_and_what_is_wrong_with_them_ends_nobody():
    primary, other = liveness.Watch(), liveness.Watch()
    told, said = [], threading.Event()

    def say(line):
        told.append(line)
        said.set()

    here = Pace(2, 0, 'zero', lambda message: None, say)
    primary.receive = here.receive
    assert liveness.join(other, liveness.listen(primary, 1, 'localhost'), 1)
    (link,) = other.links
    there = Pace(2, 1, 'one', lambda message: link.send(message=message), lambda line: None)
    link.send(message={'pace': 'nonsense'})
    for step in (10, 20, 30):
        here.report(step, 0.01, 1.0)
        there.report(step, 0.51, 1.0)
    assert said.wait(60)
    assert 'process 1) is slower than the median host by 500 ms' in told[0]
    other.leave(0)
    primary.leave(0)
