"""What looks at the loop from beside it: a trace of some updates, an update that hangs, and what the time went into."""

import ctypes
import datetime
import gzip
import json
import os
import shutil
import threading

import pytest
from runs import full_config, metrics, recipe, train

from jaxtune.errors import UserError
from jaxtune.tasks.train import TrainTask
from jaxtune.training import goodput
from jaxtune.training.hang_watch import HangWatch
from jaxtune.training.observer import Observer
from jaxtune.training.phases import PhaseTimer
from jaxtune.training.profile import Profile
from jaxtune.training.run_info import RunInfo


def until(condition):
    """Waits for what another thread does."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError('it never came to be')


def traces(folder):
    return list(folder.glob('plugins/profile/*/perfetto_trace.json.gz'))


def test_a_trace_waits_for_the_devices_at_its_two_ends_alone(tmp_path, capsys):
    seen = []
    observer = Observer(RunInfo('train', (), ''), tmp_path, 1, Profile(3, 4, tmp_path / 'profile'))
    with observer:
        for step in observer.steps(range(1, 7), lambda: seen.append('flush')):
            seen.append(step)
    assert seen == [1, 2, 'flush', 3, 4, 'flush', 5, 6]
    assert len(traces(tmp_path / 'profile')) == 1
    assert 'profile of updates 3 to 4: ' in capsys.readouterr().out


def test_a_run_that_ends_or_fails_inside_writes_what_there_is(tmp_path, capsys):
    observer = Observer(RunInfo('train', (), ''), tmp_path, 1, Profile(2, 9, tmp_path / 'profile'))

    def run():
        with observer:
            for step in observer.steps(range(1, 7), lambda: None):
                if step == 3:
                    raise UserError('not finite')

    with pytest.raises(UserError):
        run()
    assert len(traces(tmp_path / 'profile')) == 1
    assert 'profile of updates 2 to 3: ' in capsys.readouterr().out


def test_a_run_that_goes_on_later_says_that_there_is_none(tmp_path, capsys):
    observer = Observer(RunInfo('train', (), ''), tmp_path, 1, Profile(3, 4, tmp_path / 'profile'))
    with observer:
        assert list(observer.steps(range(5, 8), lambda: None)) == [5, 6, 7]
    assert capsys.readouterr().out == 'no profile of updates 3 to 4: this run goes on at update 5\n'


def test_the_updates_of_a_run_are_in_its_trace(corpus, tmp_path, capsys):
    train(recipe(corpus, train__steps=2, log__profile='2:2') | {'data.eval': ''}, tmp_path)
    (found,) = traces(tmp_path / 'profile')
    assert str(found) in capsys.readouterr().out
    names = [event.get('name', '') for event in json.loads(gzip.decompress(found.read_bytes()))['traceEvents']]
    assert any('train_step' in name for name in names)
    assert len(metrics(tmp_path, 'train/loss')) == 2


@pytest.mark.parametrize('value', ['3', '0:3', '5:3', '3:x', 'all', 7])
def test_what_names_no_updates_is_refused(corpus, value):
    with pytest.raises(UserError, match=r'log\.profile.*expected the first and the last update'):
        full_config(recipe(corpus, log__profile=value))


def test_updates_that_a_run_has_not_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r'log\.profile=5:6: expected updates of this run, which has 4'):
        train(recipe(corpus, train__steps=4, log__profile='5:6'), tmp_path)


def test_an_update_that_hangs_is_told_with_all_stacks(corpus, tmp_path, capfd, monkeypatch):
    path, update, hung = tmp_path / 'hangs' / 'process-0.txt', TrainTask.update, []

    def hangs_once(task, state, batch):
        if not hung:
            hung.append(True)
            until(lambda: path.is_file() and 'hangs_once' in path.read_text())
        return update(task, state, batch)

    monkeypatch.setattr(TrainTask, 'update', hangs_once)
    result = train(recipe(corpus, train__steps=3, log__hang_seconds=0.05), tmp_path)
    assert result['status'] == 'done'
    told = [line for line in capfd.readouterr().err.splitlines() if 'jaxtune: process 0 on ' in line]
    assert ': update 1 has not ended for ' in told[0]
    assert told[0].endswith(f'stacks of its threads: {path}')
    assert ': update 1 has ended after ' in told[1]
    assert told[0].removeprefix('jaxtune: ') in path.read_text()


def test_what_takes_long_between_updates_does_not_hang_and_a_hang_is_told_once(tmp_path, capfd):
    timer = PhaseTimer()
    watch = HangWatch(0.0, timer, tmp_path, 3, 'step')
    watch._look()  # before the first step
    watch.begin(7)
    for phase in ('eval', 'checkpoint', 'compile'):
        with timer.timed(phase), timer.timed('data'):
            watch._look()
    assert capfd.readouterr().err == ''
    with timer.timed('data'):
        until(lambda: watch._look() or watch._told)
        watch._look()
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith('jaxtune: ')]
    assert len(told) == 1
    assert 'process 3 on ' in told[0]
    assert 'step 7 has not ended for' in told[0]
    assert 'it waits for data' in told[0]


def test_stacks_come_also_where_a_library_keeps_pythons_lock(tmp_path, capfd):

    def stuck():
        ctypes.PyDLL(None).usleep(800_000)  # with the lock
        return 'Timeout (' in capfd.readouterr().err

    with HangWatch(0.01, PhaseTimer(), tmp_path, 0, 'update') as watch:
        watch.begin(1)
        until(stuck)  # at first the watchdog may not be set yet


def test_long_updates_have_a_long_limit(tmp_path):
    watch = HangWatch(5.0, PhaseTimer(), tmp_path, 0, 'update')
    assert watch._limit() == 5.0
    watch._took.extend([1.0, 30.0, 2.0])
    assert watch._limit() == 300.0


def test_what_is_compiled_inside_an_update_is_no_update():
    import jax

    timer = PhaseTimer()
    with timer.compilations(), timer.timed('step'):
        jax.jit(lambda x: x * 3 + 41)(1.0)
    assert timer.phases['compile'] > 0
    with timer.timed('step'):
        before = timer.phases['compile']
        jax.jit(lambda x: x * 5 + 43)(1.0)
    assert timer.phases['compile'] == before


def test_goodput_over_a_run_that_was_killed(corpus, tmp_path):
    keys = recipe(corpus, eval__every=8, checkpoint__every=15)
    result = train(keys, tmp_path / 'whole')
    shares = metrics(tmp_path / 'whole', 'time/goodput')
    assert all(0 < share < 1 for share in [*shares, result['metrics']['time/goodput']])
    before = json.loads((tmp_path / 'whole' / 'run.json').read_text())
    assert before['end'] == 'done'

    # As a kill after update 20 would have left it: with a checkpoint of update 15.
    killed = shutil.copytree(tmp_path / 'whole', tmp_path / 'killed')
    shutil.rmtree(killed / 'checkpoints' / '20')
    (killed / 'result.json').unlink()
    ended = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    (killed / 'run.json').write_text(json.dumps(before | {'end': 'running', 'ended': ended.isoformat()}))
    os.utime(killed / 'metrics.jsonl', (ended.timestamp() + 10.0,) * 2)
    result = train(keys, killed)
    run = json.loads((killed / 'run.json').read_text())
    assert run['phases']['lost'] == pytest.approx(goodput.good(before['phases']) - before['good']['15'] + 10.0)
    assert run['seconds'] > before['seconds'] + 10.0
    assert run['phases']['down'] > 0
    assert run['good']['20'] > run['good']['15'] == pytest.approx(before['good']['15'])
    assert goodput.good(run['phases']) == pytest.approx(run['good']['20'])
    # Years without a process.
    assert 0 < result['metrics']['time/goodput'] < 1e-3 * before['good']['20']
    page = (killed / 'report.html').read_text()
    for words in ('updates done again after a kill', 'between an end and the next start', 'Goodput'):
        assert words in page
