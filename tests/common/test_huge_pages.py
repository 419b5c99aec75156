"""The command starts itself anew with huge pages, once, and changes nothing else."""

import json
import os
import subprocess
import sys

import pytest

from jaxtune.common import huge_pages

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='huge pages of Linux')

PROGRAM = """
import json, os, sys
from pathlib import Path
from jaxtune.common import huge_pages
huge_pages._SETTING = Path(sys.argv[1])
huge_pages.begin()
born_with = [entry for entry in open('/proc/self/environ').read().split('\\0') if entry.startswith('GLIBC_TUNABLES=')]
print(json.dumps([os.getpid(), sys.argv, os.environ.get('GLIBC_TUNABLES'), born_with]))
"""


def run(setting, *arguments, **environment):
    """What the program printed: `[process number, arguments, tunables, those at its start]`, and its number."""
    without = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
    process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, str(setting), *arguments],
        env={**without, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert len(lines) == 1
    return json.loads(lines[0]), process.pid


def test_starts_anew_once_where_pages_are_given_on_request(tmp_path):
    setting = tmp_path / 'enabled'
    setting.write_text('always [madvise] never\n')
    (pid, arguments, tunables, at_start), started = run(setting, '--config', 'a b', "it's")
    assert pid == started
    assert arguments == ['-c', str(setting), '--config', 'a b', "it's"]
    assert at_start == ['GLIBC_TUNABLES=glibc.malloc.hugetlb=1']
    assert tunables is None, 'child processes would inherit it'


def test_tunables_of_the_user_stay(tmp_path):
    setting = tmp_path / 'enabled'
    setting.write_text('always [madvise] never\n')
    (_, _, tunables, at_start), _ = run(setting, GLIBC_TUNABLES='glibc.malloc.check=0')
    assert tunables == 'glibc.malloc.check=0'
    assert at_start == ['GLIBC_TUNABLES=glibc.malloc.check=0']


def test_nothing_where_the_system_decides(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError('started anew')

    monkeypatch.setattr(os, 'execve', refuse)
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    for text in ('[always] madvise never\n', 'always madvise [never]\n', None):
        setting = tmp_path / 'enabled'
        setting.unlink(missing_ok=True)
        if text is not None:
            setting.write_text(text)
        monkeypatch.setattr(huge_pages, '_SETTING', setting)
        huge_pages.begin()
