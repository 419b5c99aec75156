"""The share of a run's time that counts, over kills and restarts."""

import datetime

import pytest

from jaxtune.training import goodput

EARLIER = {
    'phases': {'step': 30.0, 'reward': 10.0, 'eval': 5.0, 'lost': 1.0},
    'good': {'10': 8.0, '20': 32.0},
    'ended': '2026-01-01T00:00:00.000+00:00',
    'end': 'running',
    'seconds': 50.0,
}
LATER = '2026-01-01T00:01:00.500+00:00'


def test_what_counts_are_the_parts_of_an_update():
    assert goodput.good({'step': 2.0, 'generate': 3.0, 'reward': 4.0, 'eval': 8.0, 'data': 16.0, 'lost': 32.0}) == 9.0


def test_updates_after_the_checkpoint_are_lost_and_so_is_the_time_without_a_process():
    phases = goodput.continued(EARLIER, 20, LATER)['phases']
    assert phases == pytest.approx({'step': 24.0, 'reward': 8.0, 'eval': 5.0, 'lost': 9.0, 'down': 60.5})
    assert goodput.good(phases) == pytest.approx(32.0)


@pytest.mark.parametrize(('step', 'lost'), [(0, 40.0), (10, 32.0), (20, 8.0), (15, 0.0)])
def test_what_is_lost_depends_on_the_checkpoint(step, lost):
    """Nothing is known of what the fourth one cost."""
    assert goodput.continued(EARLIER, step, LATER)['phases']['lost'] == pytest.approx(1.0 + lost)


@pytest.mark.parametrize('end', ['stopped', 'done'])
def test_nobody_waits_after_an_end_that_was_asked_for(end):
    assert 'down' not in goodput.continued(EARLIER | {'end': end}, 20, LATER)['phases']


def test_a_run_that_begins_has_no_past():
    assert goodput.continued({'phases': {}, 'good': {}}, 0, LATER)['phases'] == {}


@pytest.mark.parametrize('ended', ['yesterday', '2027-01-01T00:00:00+00:00'])
def test_damaged_and_future_times_are_no_time(ended):
    assert 'down' not in goodput.continued(EARLIER | {'ended': ended}, 20, LATER)['phases']


@pytest.mark.parametrize(('after', 'lost', 'down'), [(-5.0, 0.0, 60.5), (20.0, 20.0, 40.5), (1e6, 60.5, 0.0)])
def test_a_killed_run_was_at_work_as_long_as_it_wrote_metrics(after, lost, down):
    alive = datetime.datetime.fromisoformat(EARLIER['ended']).timestamp() + after
    earlier = goodput.continued(EARLIER, 20, LATER, alive)
    assert earlier['phases']['lost'] == pytest.approx(9.0 + lost)
    assert earlier['phases'].get('down', 0.0) == pytest.approx(down)
    assert earlier['seconds'] == pytest.approx(50.0 + lost)
