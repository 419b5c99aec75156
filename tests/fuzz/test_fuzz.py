"""Mutated inputs end as promised: done, or refused with one line that names the culprit."""

import pathlib
import subprocess
import sys

FUZZ = pathlib.Path(__file__).with_name('fuzz.py')


def test_200_inputs(tmp_path, monkeypatch):
    """In a process of its own, for this one has started JAX's threads, which no fork has; `fuzz.py` runs more."""
    monkeypatch.setenv('JAXTUNE_FUZZ', str(tmp_path))  # others may be making theirs
    words = [sys.executable, str(FUZZ), '--seed', '25', '--count', '200']
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert '200 cases, 0 unexpected' in ended.stdout
