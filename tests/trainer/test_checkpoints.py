"""Checkpoints that disks damage: the newest whole one is gone on from, and not one bit is taken for another."""

import pathlib
import random
import shutil

import pytest
from runs import exported, recipe, train

from jaxtune.errors import UserError
from jaxtune.recipe import workdir
from jaxtune.training.checkpoint import Checkpoints, check


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope='module')
def keys(corpus):
    return recipe(corpus, train__steps=6, checkpoint__every=2, checkpoint__keep=3, eval__every=0) | {'data.eval': ''}


@pytest.fixture(scope='module')
def whole(keys, tmp_path_factory):
    """The workdir of a run with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    train(keys, folder)
    assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['2', '4', '6']
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / 'run'))


def test_any_flipped_bit_truncated_or_missing_file_is_noticed(copy):
    newest, rng = copy / 'checkpoints' / '6', random.Random(0)
    assert check(newest) == (True, '')
    later = ('_CHECKPOINT_METADATA', 'commit_success.txt')  # which Orbax adds, with no more in them than the time
    files = [path for path in newest.rglob('*') if path.is_file() and path.name not in later]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        for damage in (lambda path: flip(path, rng), lambda path: path.write_bytes(path.read_bytes()[:-1])):
            damage(path)
            # A bit of the list of checksums itself may be one of the names in it that mean nothing here.
            assert check(newest)[1] or path.name == workdir.SIGNATURE, path
            path.write_bytes(data)
        if path.name != workdir.SIGNATURE:
            path.unlink()
            assert 'is missing' in check(newest)[1]
            path.write_bytes(data)


@pytest.mark.parametrize('damaged', [(6,), (4, 6)])
def test_the_newest_whole_one_is_gone_on_from(copy, keys, whole, capsys, damaged):
    rng = random.Random(1)
    for step in damaged:
        data = [path for path in (copy / 'checkpoints' / str(step) / 'state').rglob('*') if path.stat().st_size > 9999]
        flip(rng.choice([path for path in data if path.is_file()]), rng)
    train(keys, copy)
    output = capsys.readouterr().out
    for step in damaged:
        assert f'damaged, left out: {copy}/checkpoints/{step}: state/' in output
    assert f'continuing from checkpoint {min(damaged) - 2} of 6' in output
    assert exported(copy) == exported(whole)
    assert check(copy / 'checkpoints' / '6') == (True, '')


def test_metrics_that_cannot_be_read_are_those_of_a_damaged_one(corpus, tmp_path, capsys):
    scored = recipe(corpus, train__steps=4, checkpoint__every=2, checkpoint__keep=3, eval__every=2)
    train(scored, tmp_path / 'whole')
    for damage in (b'\xff{', b'\0' * 40, b'[1]', b''):
        run = shutil.copytree(tmp_path / 'whole', tmp_path / 'run', dirs_exist_ok=True)
        (run / 'checkpoints' / '4' / 'metrics' / 'metrics').write_bytes(damage)
        with pytest.raises(UserError, match='checkpoints/4/metrics/metrics: damaged'):
            Checkpoints(run / 'checkpoints', 3, 'eval/loss', higher_is_better=False, read_only=True)
        assert (run / 'checkpoints' / '4' / 'metrics' / 'metrics').read_bytes() == damage
        train(scored, run)
        output = capsys.readouterr().out
        assert f'damaged, left out: {run}/checkpoints/4: metrics/' in output
        assert 'continuing from checkpoint 2 of 4' in output
        assert exported(run) == exported(tmp_path / 'whole')


def test_where_all_are_damaged_the_newest_is_named(copy, keys):
    for step in (2, 4, 6):
        (copy / 'checkpoints' / str(step) / 'loop' / 'metadata').write_text('{')
    with pytest.raises(UserError, match='checkpoints/6: loop/metadata is damaged'):
        train(keys, copy)
    assert sorted(path.name for path in (copy / 'checkpoints').iterdir()) == ['2', '4', '6']


def test_one_without_checksums_is_read_if_it_can_be(copy, keys, whole, capsys):
    for step in (4, 6):
        (copy / 'checkpoints' / str(step) / workdir.SIGNATURE).unlink()
    shutil.rmtree(copy / 'checkpoints' / '6' / 'state' / 'd')
    train(keys, copy)
    assert 'continuing from checkpoint 4 of 6' in capsys.readouterr().out
    assert exported(copy) == exported(whole)
