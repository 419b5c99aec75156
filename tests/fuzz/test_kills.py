"""Killed at changes of the file system and at random moments, a run ends with the same bytes (`killpoints.py`)."""

import pathlib
import subprocess
import sys

import pytest

KILLPOINTS = pathlib.Path(__file__).with_name('killpoints.py')


@pytest.mark.exhaustive
def test_killed_and_started_again(tmp_path, monkeypatch):
    """In a process of its own, for this one has started JAX's threads, which no fork has."""
    monkeypatch.setenv('JAXTUNE_FUZZ', str(tmp_path / 'made'))
    words = [sys.executable, str(KILLPOINTS), '--kills', '10', '--tasks', 'train,generate,phases,export,prepare']
    ended = subprocess.run([*words, '--keep', str(tmp_path / 'runs')], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
