"""Two processes: one reads the data for both, or each where they share no disk."""

import os
import socket
import subprocess
import sys

PROGRAM = """
import pathlib, sys
from jaxtune.parallel import hosts
hosts.initialize()
import jax
from jaxtune.data.cache import once
from jaxtune.errors import UserError

me = jax.process_index()
def build(folder):
    (folder / f'built-by-{me}').touch()
def refuse():
    raise UserError('a.jsonl:3: broken')

shared, own = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]) / f'disk-{me}'
once(lambda: any(shared.glob('built-by-*')), lambda: build(shared), 'data.train')
once(lambda: any(own.glob('built-by-*')), lambda: build(own), 'data.train')
try:
    once(lambda: False, refuse, 'data.eval')
except UserError as error:
    (own / 'error').write_text(str(error))
"""


def test_one_builds_for_all_that_see_its_disk(tmp_path):
    with socket.socket() as server:
        server.bind(('localhost', 0))
        port = server.getsockname()[1]
    processes = []
    for number in range(2):
        (tmp_path / f'disk-{number}').mkdir()
        environment = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': '',
            'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
            'JAX_NUM_PROCESSES': '2',
            'JAX_PROCESS_ID': str(number),
        }
        command = [sys.executable, '-c', PROGRAM, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [path.name for path in tmp_path.glob('built-by-*')] == ['built-by-0']
    for number in range(2):
        assert (tmp_path / f'disk-{number}' / f'built-by-{number}').exists()
    assert (tmp_path / 'disk-0' / 'error').read_text() == 'a.jsonl:3: broken'
    assert (tmp_path / 'disk-1' / 'error').read_text() == 'data.eval: process 0 cannot read the data; see its message'
