"""Several processes as one program: the same losses as in one process, and one step at which all stop on SIGTERM."""

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from jaxtune import models
from jaxtune.common import preemption
from jaxtune.parallel import hosts, make_mesh, match_rules, place, shardings
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.training.program import make_program

# tests/trainer/test_pod.py runs the whole command on two hosts.
pytestmark = pytest.mark.exhaustive

STEPS, ROWS, LENGTH = 3, 8, 16
FIELDS = {
    'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2,
    'num_attention_heads': 2, 'num_key_value_heads': 2, 'max_position_embeddings': LENGTH,
}  # fmt: skip


def rows_of(step: int) -> dict[str, np.ndarray]:
    """The global batch of an update."""
    tokens = np.random.default_rng(step).integers(0, FIELDS['vocab_size'], (ROWS, LENGTH + 1), np.int32)
    return {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        'segment_ids': np.ones((ROWS, LENGTH), np.int32),
        'loss_mask': np.ones((ROWS, LENGTH), np.float32),
    }


def updates(mesh):
    """Runs updates on a mesh for ever; yields `(how many, loss)`."""
    config = recipes.defaults()
    optimizer = {'optimizer.name': 'sgd', 'optimizer.lr': 1e-2, 'optimizer.schedule': 'constant'}
    recipes.apply_overrides(config, {'data.seq_len': LENGTH, 'train.batch_size': ROWS} | optimizer)
    model = models.build(models.read_config(FIELDS))
    with jax.set_mesh(mesh):
        placed = shardings(match_rules(model.shapes, mesh), mesh)
        params = jax.jit(model.init, out_shardings=placed)(jax.random.key(0))
        program = make_program(
            mesh, model, params, specs.objective(config), optimizer=config.optimizer, steps=100, batch_size=ROWS
        )
        state, step, frozen = program.init_state(params), program.train_step(1), jax.tree.map(lambda _: None, params)
        done = 0
        while True:
            batch = rows_of(done)
            seen = []

            def read(low, high, batch=batch, seen=seen):
                seen.append((low, high))
                return {name: value[low:high] for name, value in batch.items()}

            state, metrics = step(state, frozen, place(read, ROWS, mesh))
            assert seen == [(0, ROWS)] or jax.process_count() > 1
            assert all(high - low == ROWS // jax.process_count() for low, high in seen), 'reads rows of other hosts'
            done += 1
            yield done, float(metrics['loss'])


def worker() -> None:
    """One of the processes: prints the first losses, then trains until SIGTERM reaches any of them."""
    preemption.install()
    hosts.initialize()
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    assert hosts.is_primary() == (jax.process_index() == 0)
    with preemption.deferred():
        for done, loss in updates(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 1})):
            if done <= STEPS:
                print(f'loss {loss!r}', flush=True)
            if preemption.received(done):
                print(f'stopped {done}', flush=True)
                sys.exit(preemption.status())


@pytest.fixture(scope='module')
def outcomes():
    """Two processes, SIGTERM to the second one after some updates: their exit statuses and the lines they printed."""
    local = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'local.py'
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in runpy.run_path(str(local))['environments'](2, 2)
    ]
    lines = [[], []]

    def collect(process, into):
        for line in process.stdout:
            into.append(line.strip())
            if process is processes[1] and line.startswith('loss') and len(losses(into)) == STEPS:
                process.send_signal(signal.SIGTERM)

    readers = [threading.Thread(target=collect, args=pair) for pair in zip(processes, lines, strict=True)]
    for reader in readers:
        reader.start()
    try:
        statuses = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for reader in readers:
            reader.join()
    return statuses, lines


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[1]) for line in lines if line.startswith('loss')]


def test_losses_of_two_processes_equal_those_of_one(outcomes):
    _, lines = outcomes
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 1}, jax.devices()[:4])
    expected = [loss for (_, loss), _ in zip(updates(mesh), range(STEPS), strict=False)]
    assert len(set(expected)) == STEPS
    for printed in lines:
        np.testing.assert_allclose(losses(printed), expected, rtol=1e-6, err_msg='\n'.join(printed))


def test_sigterm_to_one_process_stops_all_at_one_step(outcomes):
    statuses, lines = outcomes
    assert statuses == [143] * 2, '\n'.join(lines[0] + lines[1])
    stopped = [[line for line in printed if line.startswith('stopped')] for printed in lines]
    assert len(stopped[0]) == 1
    assert stopped[0] == stopped[1]


if __name__ == '__main__':
    worker()
