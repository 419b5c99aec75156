"""`metrics.jsonl` through kills and resumes; phases, speed and `run.json`."""

import contextlib
import json
import math
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxtune.common import console
from jaxtune.errors import UserError
from jaxtune.metrics.writer import MetricsWriter, peak_memory_bytes
from jaxtune.models.attention import KernelLog
from jaxtune.parallel import hardware
from jaxtune.recipe import recipes
from jaxtune.training import announce
from jaxtune.training.run_info import RunInfo, command_line


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 8):
        writer.write(step, {'train/loss': 1 / 3 + step})
    writer.write(4, {'eval/loss': 2.0})
    with (tmp_path / 'metrics.jsonl').open('a') as file:  # kill -9 within a line
        file.write('{"step": 8, "train/lo')

    resumed = MetricsWriter(tmp_path, resume_step=5)
    assert [row['step'] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 4]
    assert resumed.latest() == {'train/loss': 1 / 3 + 5}
    for step in range(6, 11):
        resumed.write(step, {'train/loss': 1 / 3 + step})
    resumed.close()
    resumed.close()
    trained = [row for row in lines(tmp_path) if 'train/loss' in row]
    assert [row['step'] for row in trained] == list(range(1, 11))
    assert [row['train/loss'] for row in trained] == [1 / 3 + step for step in range(1, 11)], 'to the last bit'


def test_a_line_is_on_disk_at_once_and_a_fresh_start_is_empty(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {'train/loss': jnp.float32(2.5), 'n': np.int64(3)})
    assert lines(tmp_path) == [{'step': 1, 'train/loss': 2.5, 'n': 3}]
    writer.close()
    MetricsWriter(tmp_path).close()
    assert lines(tmp_path) == []


def test_what_is_not_finite_becomes_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {'train/loss': math.nan, 'train/grad_norm': jnp.inf, 'eval/loss': 1.0})
    writer.close()
    text = (tmp_path / 'metrics.jsonl').read_text()

    def refuse(name):
        raise ValueError(f'{name} is not JSON')

    assert json.loads(text, parse_constant=refuse) == {
        'step': 1,
        'train/loss': None,
        'train/grad_norm': None,
        'eval/loss': 1.0,
    }
    assert writer.latest() == {'train/loss': None, 'train/grad_norm': None}


def _events(workdir):
    for path in sorted((workdir / 'tensorboard').iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, content, its checksum
            size = int.from_bytes(data[at : at + 8], 'little')
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_tensorboard_gets_the_scalars_and_is_told_what_to_forget(tmp_path):
    MetricsWriter(tmp_path).close()
    writer = MetricsWriter(tmp_path, resume_step=5)
    writer.write(6, {'train/loss': 2.5, 'train/grad_norm': math.nan})
    writer.close()
    events = list(_events(tmp_path))
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(6, 'train/loss', 2.5)]
    assert [event.step for event in events if event.session_log.status == 1] == [6], 'steps from 6 on are purged'


def test_other_processes_write_nothing(tmp_path):
    console.set_primary(False)
    try:
        writer = MetricsWriter(tmp_path / 'run')
        writer.write(1, {'train/loss': 1.0})
        assert writer.latest() == {'train/loss': 1.0}
        writer.close()
    finally:
        console.set_primary(True)
    assert not (tmp_path / 'run').exists()


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(UserError, match=r'log\.wandb'):
        MetricsWriter(tmp_path, wandb=True)


def test_peak_memory_of_this_process():
    before = peak_memory_bytes()
    block = np.ones(200 << 20, np.uint8)
    assert before > 50 << 20
    assert peak_memory_bytes() >= max(before, block.nbytes)


def make_info(**keys):
    config = recipes.defaults()
    recipes.apply_overrides(config, {name.replace('__', '.'): value for name, value in keys.items()})
    argv = ('/x/jaxtune/main.py', '--config', 'configs/a b.py', '--config.train.steps=3')
    tokens = config.train.batch_size * config.data.seq_len
    return RunInfo(config.task, argv, 'configs/a b.py', tokens_per_step=tokens)


def test_time_inside_a_phase_counts_once():
    info = make_info()
    start = time.perf_counter()
    with info.timed('eval'):
        time.sleep(0.02)
        with info.timed('data'):
            time.sleep(0.05)
            with info.timed('eval'):
                time.sleep(0.01)
    with contextlib.suppress(ValueError), info.timed('step'):
        time.sleep(0.01)
        raise ValueError('time before an error counts too')
    wall = time.perf_counter() - start
    assert sum(info.timer.phases.values()) == pytest.approx(wall, abs=0.003)
    assert 0.03 <= info.timer.phases['eval'] < 0.05 <= info.timer.phases['data']
    assert info.timer.phases['step'] >= 0.01


class FakeModel:
    kind = 'decoder'
    hf_config = {'model_type': 'llama'}  # noqa: RUF012
    config = SimpleNamespace(num_layers=2, d_model=8, num_heads=2, vocab_size=16)
    kernels = KernelLog()

    def flops_per_token(self, length):
        return 1000.0 * length


def test_speed_and_mfu(monkeypatch):
    info = make_info(train__batch_size=4, data__seq_len=32)
    params = {'a': np.zeros((3, 5), np.float32), 'b': np.zeros(2, np.float32)}
    info.flops_per_token = 1000.0 * 32
    info.describe_model(FakeModel(), params, {'a': params['a'], 'b': None}, None)
    monkeypatch.setattr(hardware, 'peak_flops', lambda: 1e8)
    speed = info.speed(5.0)
    assert speed['train/tokens_per_second'] == 5 * 4 * 32
    assert speed['train/step_seconds'] == 0.2
    assert speed['train/mfu'] == pytest.approx(1000 * 32 * 640 / 1e8)

    unknown = make_info()
    unknown.describe_model(FakeModel(), params, params, None)
    monkeypatch.setattr(hardware, 'peak_flops', lambda: None)
    assert 'train/mfu' not in unknown.speed(5.0)


def test_peaks():
    assert hardware.published_peak('TPU v5 lite') == 197e12
    assert hardware.published_peak('TPU v5') == 459e12
    assert hardware.published_peak('NVIDIA H100 80GB HBM3') == 989e12
    assert hardware.published_peak('NVIDIA L40S') == 362e12
    assert hardware.published_peak('Quantum 9000') is None
    # Two cores of one chip, each a device of its own.
    cores = [SimpleNamespace(platform='tpu', coords=(0, 0, 0), slice_index=0) for _ in range(2)]
    assert hardware.chips(cores) == 1
    # A laptop does at least 1 GFLOPs, and eight virtual devices do not make eight machines.
    assert hardware.peak_flops() == hardware.cpu_peak() > 1e9


def test_run_json_adds_up_over_runs(tmp_path):
    for _ in range(2):
        info = make_info()
        with info.timed('step'):
            time.sleep(0.02)
        info.write(tmp_path)
        info.write(tmp_path)  # once more at the end: the same run
    run = json.loads((tmp_path / 'run.json').read_text())
    assert run['runs'] == 2
    assert 0.04 <= run['phases']['step'] < 0.06
    assert run['seconds'] >= run['phases']['step']
    assert run['command'] == "python -m jaxtune.main --config 'configs/a b.py' --config.train.steps=3"
    assert run['versions']['jax']
    assert run['hardware']['cores'] >= 1


def test_first_and_last_lines_fit_a_terminal(tmp_path, capsys):
    info = make_info(train__batch_size=4, data__seq_len=32)
    params = {'a': np.zeros((300, 500), np.float32)}
    info.describe_model(FakeModel(), params, params, {'mu': params['a']})
    workdir = tmp_path / 'run'
    (workdir / 'export').mkdir(parents=True)
    updates = announce.updates_line(400, 1, 4, info.tokens_per_step, 32, 100)
    optimizer, kernels = recipes.defaults().optimizer, KernelLog()
    announce.announce(
        info, workdir, data={'rows': 100}, kernels=kernels, memory={}, updates=updates, optimizer=optimizer
    )
    first = capsys.readouterr().out
    assert '150K parameters, all train' in first
    assert '51.2K tokens, 16 epochs' in first
    metrics = {'eval/loss': 2.5, 'eval/perplexity': 12.18, 'eval/bits_per_byte': 1.5}
    announce.conclude(info, workdir, 400, metrics, gzip=2.0)
    last = capsys.readouterr().out
    assert '1.500 bits a byte (gzip -9: 2.000)' in last
    assert 'from_pretrained' in last
    for text in (first, last):
        assert len(text.splitlines()) <= 12
        assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)


def test_the_command_is_quoted_for_a_shell():
    assert command_line(['main.py', '--config.x=a b']) == "python -m jaxtune.main '--config.x=a b'"
