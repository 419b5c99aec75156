"""Standard output that is closed, full or left by its reader ends no run."""

import io
import subprocess
import sys

import pytest

from jaxtune.common.streams import Output

PROGRAM = """
import sys
from jaxtune.common import streams
streams.open_all()
file = open(sys.argv[1], 'w')
from jaxtune.common import console
for _ in range(3000):
    console.note('a line ▸ that is printed')
file.write(f'{file.fileno()} done')
"""


@pytest.mark.parametrize(
    ('redirection', 'said'),
    [
        ('>&-', ''),
        ('>&- 2>&-', ''),
        ('> /dev/full', 'jaxtune: standard output: No space left on device; going on without it\n'),
        ('| head -1 > /dev/null', 'jaxtune: standard output: Broken pipe; going on without it\n'),
        ('2>&- > /dev/full', ''),
    ],
)
def test_a_program_goes_on_without_its_output(tmp_path, redirection, said):
    command = f'"$0" -c "$1" "$2" {redirection}; echo $? > "$2.status"'
    command = command.replace('; echo', ' ; echo') if '|' not in redirection else f'set -o pipefail; {command}'
    words = ['bash', '-c', command, sys.executable, PROGRAM, str(tmp_path / 'made')]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, said)
    assert (tmp_path / 'made.status').read_text() == '0\n'
    number, word = (tmp_path / 'made').read_text().split()
    assert (int(number) > 2, word) == (True, 'done')  # what is printed does not land in a file of ours


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, 'latin-1', write_through=True))
    Output().write('é ▸ \ud800')
    assert raw.getvalue() == 'é '.encode('latin-1') + rb'\u25b8 \ud800'
