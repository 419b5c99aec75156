"""What a run is and where its time goes: its first lines, its last lines, and `run.json` for the report."""

import contextlib
import datetime
import functools
import pathlib
import shlex
import time
from collections.abc import Iterator
from typing import Any

from jaxtune import objectives
from jaxtune.common import console
from jaxtune.common.formatting import amount, duration, size
from jaxtune.common.io import read_json, write_json
from jaxtune.models.attention import KernelLog
from jaxtune.parallel import copied_bytes, hardware
from jaxtune.weights import tree

NAME = 'run.json'


def command_line(argv) -> str:
    """What to type to run this again."""
    return shlex.join(['python', '-m', 'jaxtune.main', *argv[1:]])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


class RunInfo:
    """Facts about one run.

    Args:
      command: the `flags.Command`.
      config: the recipe of this task.
      mesh: the mesh of devices, or None for a task that uses none.
    """

    def __init__(self, command, config, mesh=None):
        self.command, self.config, self.mesh = command, config, mesh
        self.phases: dict[str, float] = {}
        self._open: list[float] = []  # seconds spent in phases inside each open one
        self._began, self._started = time.perf_counter(), _now()
        self._earlier: dict[str, Any] | None = None
        self._facts: dict[str, Any] = {}
        self._flops_per_token: float | None = None
        self._kernels = KernelLog()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to a phase; those of a phase inside it count for that one only."""
        self._open.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.phases[name] = self.phases.get(name, 0.0) + seconds - self._open.pop()
            if self._open:
                self._open[-1] += seconds

    def describe_model(self, model, params, trainable, opt_state) -> None:
        """Notes what the model is and what it holds.

        Args:
          model: `models.Model`.
          params: all parameters.
          trainable: those that train; None where the others were.
          opt_state: the optimizer's state, or None where nothing trains.
        """
        self._kernels = model.kernels
        with contextlib.suppress(NotImplementedError):
            self._flops_per_token = flops_per_token(self.config, model)
        self._facts['model'] = {
            'family': model.hf_config.get('model_type', model.kind),
            'layers': getattr(model.config, 'num_layers', None),
            'd_model': getattr(model.config, 'd_model', None),
            'heads': getattr(model.config, 'num_heads', None),
            'vocab_size': getattr(model.config, 'vocab_size', None),
            'parameters': tree.count(params),
            'trainable': tree.count(trainable),
            'weight_bytes': tree.nbytes(params),
            'copied_bytes': copied_bytes((params, opt_state)),
            'optimizer_bytes': tree.nbytes(opt_state),
            'flops_per_token': self._flops_per_token,
        }

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update, padding included."""
        if self.config.task not in ('train', 'evaluate', 'compile'):
            return self.config.train.batch_size * self.config.data.seq_len
        sequences = getattr(objectives.get(self.config.objective), 'SEQUENCES', 1)
        return self.config.train.batch_size * sequences * self.config.data.seq_len

    @functools.cached_property
    def peak_flops(self) -> float | None:
        """FLOPs a second of all devices at their best (see `hardware`); None where that is not known."""
        return hardware.peak_flops()

    def speed(self, updates_per_second: float, tokens_per_step: int | None = None) -> dict[str, float]:
        """`train/tokens_per_second`, `train/step_seconds` and, where the devices' peak is known, `train/mfu`.

        MFU is the share of the peak that the model's own FLOPs make up, nothing computed twice counted (Chowdhery et
        al. 2022, arXiv:2204.02311, appendix B). The peak is the published bfloat16 one, also for float32; on a CPU it
        is a measured float32 one.
        """
        tokens = updates_per_second * (tokens_per_step or self.tokens_per_step)
        metrics = {'train/tokens_per_second': tokens, 'train/step_seconds': 1 / max(updates_per_second, 1e-9)}
        if self._flops_per_token and self.peak_flops:
            metrics['train/mfu'] = self._flops_per_token * tokens / self.peak_flops
        return metrics

    def announce(self, run) -> None:
        """Prints the first lines of a training run.

        Args:
          run: has `workdir` and `steps`, and maybe `accumulate`, `step` (compiled), `rows` (of the training data) and
            `gzip_bits_per_byte` (of the held-out documents).
        """
        _ = self.peak_flops  # measured now, while nothing else runs
        machine = self._machine()
        data = _data(run)
        memory = _compiled_memory(getattr(run, 'step', None))
        self._facts |= {'attention': list(self._kernels.names), 'data': data, 'memory': memory}
        self._facts |= {'steps': run.steps, 'accumulate': getattr(run, 'accumulate', 1)}
        self._facts |= {'gzip_bits_per_byte': getattr(run, 'gzip_bits_per_byte', None)}
        console.facts(
            [
                ('devices', f'{_devices(machine)}; mesh {self._mesh()}'),
                ('model', self._model_line()),
                ('memory', self._memory_line(memory)),
                ('attention', str(self._kernels)),
                ('data', _data_line(data)),
                ('updates', self._updates_line(run, data)),
                ('optimizer', _optimizer_line(self.config)),
                ('results', f'{run.workdir}'),
            ]
        )
        self._show_example(run)

    def _show_example(self, run) -> None:
        """Prints an example as the model will see it, where the objective has one to show."""
        preview = getattr(objectives.get(self.config.objective), 'preview', None)
        if preview is None or not hasattr(run, 'rows') or not hasattr(run, 'parts'):
            return
        pieces = preview(run.rows, run.parts.tokenizer)
        self._facts['example'] = [[text, trained] for text, trained in pieces]
        console.example(pieces, 'first example; the model learns to write what stands out')

    def _machine(self) -> dict[str, Any]:
        if 'hardware' not in self._facts:
            self._facts['hardware'] = hardware.describe()
        return self._facts['hardware']

    def _mesh(self) -> str:
        sizes = {} if self.mesh is None else {name: size for name, size in self.mesh.shape.items() if size > 1}
        return ' x '.join(f'{name} {size}' for name, size in sizes.items()) or '1'

    def _model_line(self) -> str:
        model = self._facts.get('model')
        if not model:
            return ''
        trains = 'all train' if model['trainable'] == model['parameters'] else f'{amount(model["trainable"])} train'
        shape = f'{model["layers"]} layers, d_model {model["d_model"]}'
        return f'{model["family"]}, {shape}, {amount(model["parameters"])} parameters, {trains}'

    def _memory_line(self, memory: dict[str, int]) -> str:
        model = self._facts.get('model')
        parts = []
        if model:
            parts += [f'weights {size(model["weight_bytes"])}', f'optimizer {size(model["optimizer_bytes"])}']
            parts += [f'{size(model["copied_bytes"])} of them on every device'] if model['copied_bytes'] else []
        if memory:
            parts += [f'step {size(memory["temp_bytes"])} a device']
        return ', '.join(parts)

    def _updates_line(self, run, data: dict[str, Any]) -> str:
        config, tokens = self.config, self.tokens_per_step
        cut = f' in {run.accumulate} micro-batches' if getattr(run, 'accumulate', 1) > 1 else ''
        epochs = f', {run.steps * config.train.batch_size / data["rows"]:.3g} epochs' if data.get('rows') else ''
        return (
            f'{run.steps:,} of {tokens // config.data.seq_len} x {config.data.seq_len} = {tokens:,} tokens{cut}: '
            f'{amount(run.steps * tokens)} tokens{epochs}'
        )

    def write(self, workdir: pathlib.Path) -> None:
        """Writes `run.json`; phases and seconds of earlier runs in the same workdir are added. May be called again."""
        if not console.is_primary():
            return
        if self._earlier is None:
            self._earlier = read_json(workdir / NAME) or {}
        before, argv = self._earlier, list(self.command.argv)
        phases = dict(before.get('phases', {}))
        for name, seconds in self.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds
        self._machine()
        write_json(
            workdir / NAME,
            {
                'task': self.config.task,
                'command': command_line(argv),
                'argv': argv,
                'recipe': str(self.command.recipe),
                'started': before.get('started', self._started),
                'ended': _now(),
                'runs': before.get('runs', 0) + 1,
                'seconds': before.get('seconds', 0.0) + time.perf_counter() - self._began,
                'phases': phases,
                'versions': hardware.versions(),
                'mesh': {} if self.mesh is None else dict(self.mesh.shape),
                'tokens_per_step': self.tokens_per_step,
                'peak_flops': self.__dict__.get('peak_flops'),
                **self._facts,
            },
        )

    def close(self, run, exported: int, metrics: dict[str, Any]) -> None:
        """Prints the last lines of a training run.

        Args:
          run: has `workdir`, and maybe `gzip_bits_per_byte`.
          exported: the update whose weights are in `export/`.
          metrics: those of `result.json`.
        """
        gzip = getattr(run, 'gzip_bits_per_byte', None)
        seconds = time.perf_counter() - self._began + (self._earlier or {}).get('seconds', 0.0)
        speed = metrics.get('train/tokens_per_second')
        made = [name for name in ('export', 'adapter', 'checkpoints') if (run.workdir / name).is_dir()]
        made += [name for name in ('metrics.jsonl', 'samples.jsonl', 'report.html') if (run.workdir / name).is_file()]
        export = run.workdir / 'export'
        console.facts(
            [
                ('reward', _number(metrics.get(f'{self.config.task}/reward'), '.4f')),
                ('train loss', _number(metrics.get('train/loss'), '.4f')),
                ('held out', _held_out(metrics, gzip)),
                ('time', duration(seconds) + (f', {speed:,.0f} tokens/s at the end' if speed else '')),
                ('made', f'{run.workdir}/: {", ".join(made)}; weights of update {exported}'),
                ('generate', _generate_command(run, self.config.objective)),
                (
                    'or load',
                    f"{_auto_class(self.config.objective)}.from_pretrained('{export}')" if export.is_dir() else '',
                ),
            ]
        )


def flops_per_token(config, model) -> float:
    """Training FLOPs a token of rows: of an encoder-decoder, one of the source with its share of the target.

    Frozen kernels have two products instead of three: no gradient of their own.
    """
    lengths = [config.data.seq_len]
    if model.kind == 'encdec':
        lengths.append(objectives.get(config.objective).row(config)['targets'].shape[0])
    flops = model.flops_per_token(*lengths)
    return flops if config.method.name == 'full' else flops * 2 / 3


def _number(value: float | None, spec: str) -> str:
    return '' if value is None else format(value, spec)


def _held_out(metrics: dict[str, Any], gzip: float | None) -> str:
    parts = []
    if (reward := metrics.get('eval/reward')) is not None:
        parts.append(f'reward {reward:.4f}')
    if (loss := metrics.get('eval/loss')) is not None:
        parts.append(f'loss {loss:.4f}')
    if (perplexity := metrics.get('eval/perplexity')) is not None:
        parts.append(f'perplexity {perplexity:,.2f}')
    if (accuracy := metrics.get('eval/accuracy')) is not None:
        longer = metrics.get('eval/longer_is_better')
        parts.append(f'accuracy {accuracy:.1%}' + ('' if longer is None else f' (the longer answer: {longer:.1%})'))
    if (exact := metrics.get('eval/exact_match')) is not None:
        parts.append(f'whole answers {exact:.1%}')
    if (bits := metrics.get('eval/bits_per_byte')) is not None:
        parts.append(f'{bits:.3f} bits a byte' + (f' (gzip -9: {gzip:.3f})' if gzip else ''))
    return ', '.join(parts)


# The class in `transformers` that loads what an objective trains.
_AUTO = {
    'masked_lm': 'MaskedLM',
    'classification': 'SequenceClassification',
    'reward': 'SequenceClassification',
    'span_corruption': 'Seq2SeqLM',
    'seq2seq': 'Seq2SeqLM',
}


def _auto_class(objective: str) -> str:
    return f'transformers.AutoModelFor{_AUTO.get(objective, "CausalLM")}'


def _generate_command(run, objective: str) -> str:
    if not (run.workdir / 'export').is_dir() or objective in ('masked_lm', 'classification', 'reward'):
        return ''
    lines = (
        'python -m jaxtune.main --config configs/generate.py',
        f'--config.model.path={shlex.quote(str(run.workdir))} --config.data.eval=PROMPTS.jsonl',
    )
    return '\n'.join(lines) if len(lines[0]) + len(lines[1]) > console.WIDTH - 14 else ' '.join(lines)


def _devices(machine: dict[str, Any]) -> str:
    hosts = f' on {machine["processes"]} hosts' if machine['processes'] > 1 else ''
    if machine['platform'] == 'cpu':
        return f'{machine["devices"]} x CPU ({machine["cores"]} cores, {machine["cpu"]}){hosts}'
    memory = f' ({size(machine["device_bytes"])} each)' if machine['device_bytes'] else ''
    return f'{machine["devices"]} x {machine["device_kind"]}{memory}{hosts}'


def _data(run) -> dict[str, Any]:
    """Rows, documents and tokens of the training data, as far as its source knows them."""
    rows = getattr(run, 'rows', None)
    if rows is None:
        return {}
    source, found = getattr(rows, 'tokens', None), {'rows': len(rows), **getattr(rows, 'facts', {})}
    if source is not None:
        found = {'documents': source.documents, 'tokens': len(source), **found, 'text_bytes': source.text_bytes}
    return found


# What the training data is counted in, as far as its source knows.
_DATA = ('documents', 'pairs', 'examples', 'tokens', 'trained_tokens', 'rows')


def _data_line(data: dict[str, Any]) -> str:
    names = tuple((name, name.replace('_', ' ')) for name in _DATA)
    return ', '.join(f'{amount(data[name])} {word}' for name, word in names if name in data)


def _optimizer_line(config) -> str:
    settings = config.optimizer
    warmup = f' after {settings.warmup_steps} warm-up updates' if settings.warmup_steps else ''
    return f'{settings.name}, learning rate {settings.lr:g}, {settings.schedule}{warmup}'


def _compiled_memory(step) -> dict[str, int]:
    """Bytes a device needs for a compiled step, by the compiler's estimate."""
    analysis = step.memory_analysis() if hasattr(step, 'memory_analysis') else None
    if analysis is None:
        return {}
    return {
        'argument_bytes': int(analysis.argument_size_in_bytes),
        'output_bytes': int(analysis.output_size_in_bytes),
        'alias_bytes': int(analysis.alias_size_in_bytes),
        'temp_bytes': int(analysis.temp_size_in_bytes),
    }
