"""What an update needs, as `task=compile` predicts it from shapes alone, beside what a run of it takes.

    python benchmarks/memory.py [--config.KEY=VALUE ...]

Runs `task=compile` of a Llama of 150M parameters (any key may be changed) and then three updates. On a GPU or TPU the
run's figure is the device's own peak. On the CPU, where XLA keeps no account, it is the bytes of all arrays before an
update, and by how much the process's resident memory rises above that during it. Prints one JSON line: both in bytes,
and predicted by measured.
"""

import contextlib
import ctypes
import gc
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import psutil

from jaxtune import main as door
from jaxtune.metrics.writer import peak_memory_bytes
from jaxtune.tasks import setup

RECIPE = """
from ml_collections import ConfigDict

def get_config():
    config = {'model_type': 'llama', 'vocab_size': 8192, 'hidden_size': 1024, 'intermediate_size': 2816,
              'num_hidden_layers': 12, 'num_attention_heads': 16, 'max_position_embeddings': 1024}
    return ConfigDict({
        'task': 'train', 'objective': 'causal_lm', 'model': {'config': config}, 'tokenizer': {'path': 'bytes'},
        'data': {'train': 'python-stdlib', 'seq_len': 256}, 'train': {'steps': 3, 'batch_size': 4, 'accumulate': 1},
        'eval': {'every': 0}, 'optimizer': {'lr': 1e-4},
    })
"""


def measure(step, rises: list[int]):
    """The update, noting before and during each call what the process holds."""

    def measured(*arguments):
        gc.collect()
        ctypes.CDLL('libc.so.6').malloc_trim(0)
        before = psutil.Process().memory_info().rss
        pathlib.Path('/proc/self/clear_refs').write_text('5')  # the peak is counted from here
        held = sum(array.nbytes for array in jax.live_arrays())
        made = jax.block_until_ready(step(*arguments))
        status = pathlib.Path('/proc/self/status').read_text().split()
        rises.append(held + int(status[status.index('VmHWM:') + 1]) * 1024 - before)
        return made

    return measured


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        recipe, rises, real = pathlib.Path(folder) / 'recipe.py', [], setup.compiled_step
        recipe.write_text(RECIPE)
        command = [f'--config={recipe}', *sys.argv[1:]]
        ahead = [sys.executable, '-m', 'jaxtune.main', *command, '--config.task=compile', f'--workdir={folder}/ahead']
        subprocess.run(ahead, check=True, stdout=sys.stderr)
        predicted = json.loads(pathlib.Path(folder, 'ahead', 'compile.json').read_text())['peak_bytes_per_device']

        def compiled_step(*arguments):
            accumulate, step = real(*arguments)
            return accumulate, measure(step, rises) if jax.default_backend() == 'cpu' else step

        setup.compiled_step = compiled_step
        if status := door.main(['memory.py', *command, f'--workdir={folder}/run']):
            sys.exit(status)
        measured = max(rises) if rises else peak_memory_bytes()
    print(json.dumps({'predicted': predicted, 'measured': measured, 'ratio': round(predicted / measured, 4)}))


if __name__ == '__main__':
    main()
