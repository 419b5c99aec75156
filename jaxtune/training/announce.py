"""The first and the last lines of a run that trains."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.common import console
from jaxtune.common.formatting import amount, duration, size
from jaxtune.common.settings import Settings
from jaxtune.data.mixture import Mixture
from jaxtune.models.attention import KernelLog
from jaxtune.training.run_info import RunInfo

# What the training data is counted in, as far as its source knows.
_DATA = ('documents', 'pairs', 'examples', 'tokens', 'trained_tokens', 'rows')


def announce(
    info: RunInfo,
    workdir: pathlib.Path,
    *,
    data: Mapping[str, Any],
    kernels: KernelLog,
    memory: Mapping[str, int],
    updates: str,
    optimizer: Settings,
    mixture: Mapping[str, Mapping[str, float]] | None = None,
    targets: str = '',
) -> None:
    """Prints the first lines.

    Args:
      info: of the run; its model is described.
      workdir: of the run.
      data: counts of the training data.
      kernels: of attention and of products, that were chosen.
      memory: bytes of the compiled step.
      updates: how many, and of what.
      optimizer: the recipe's `optimizer` subtree.
      mixture: of the training data, as `mixture_facts` has it.
      targets: what part of the model these reach.
    """
    _ = info.peak_flops  # measured now, while nothing else runs
    machine = info.machine()
    info.facts |= {
        'attention': list(kernels.names),
        'products': kernels.products,
        'data': dict(data),
        'memory': dict(memory),
    }
    if mixture:
        info.facts['mixture'] = dict(mixture)
    console.facts(
        [
            ('devices', f'{_devices(machine)}; mesh {_mesh(info)}'),
            ('model', _model_line(info.facts.get('model'))),
            ('targets', targets),
            ('memory', _memory_line(info.facts.get('model'), memory)),
            ('attention', str(kernels)),
            ('experts', ', '.join(kernels.experts)),
            ('products', kernels.products_line),
            ('data', _data_line(data)),
            ('mixture', _mixture_line(mixture or {})),
            ('updates', updates),
            ('optimizer', _optimizer_line(optimizer)),
            ('results', f'{workdir}'),
        ]
    )


def mixture_facts(rows: Any, count: int) -> dict[str, dict[str, float]]:
    """Of each source of a `Mixture` its share of the first rows of training, and how often these go through it.

    Args:
      rows: those of training; for any but a mixture there is nothing to say.
      count: how many of them the run takes.
    """
    if not isinstance(rows, Mixture):
        return {}
    shares, taken, epochs = rows.shares, rows.taken(count), rows.epochs(count)
    order = sorted(shares, key=lambda label: (-shares[label], label))
    return {label: {'share': float(shares[label]), 'rows': taken[label], 'epochs': epochs[label]} for label in order}


def show_example(info: RunInfo, pieces: Sequence[tuple[str, bool]]) -> None:
    """Prints an example as the model will see it, in pieces of which some are trained on."""
    info.facts['example'] = [[text, trained] for text, trained in pieces]
    console.example(pieces, 'first example; the model learns to write what stands out')


def updates_line(
    steps: int, accumulate: int, batch_size: int, tokens_per_step: int, seq_len: int, rows: int | None
) -> str:
    """How many updates of how many tokens, and how often these go through the data."""
    cut = f' in {accumulate} micro-batches' if accumulate > 1 else ''
    epochs = f', {steps * batch_size / rows:.3g} epochs' if rows else ''
    return (
        f'{steps:,} of {tokens_per_step // seq_len} x {seq_len} = {tokens_per_step:,} tokens{cut}: '
        f'{amount(steps * tokens_per_step)} tokens{epochs}'
    )


def conclude(
    info: RunInfo,
    workdir: pathlib.Path,
    exported: int,
    metrics: Mapping[str, Any],
    *,
    reward: float | None = None,
    gzip: float | None = None,
    auto_class: str = 'CausalLM',
) -> None:
    """Prints the last lines.

    Args:
      info: of the run.
      workdir: of the run.
      exported: the update whose weights are in `export/`.
      metrics: those of `result.json`.
      reward: the mean reward of the last step.
      gzip: bits per byte of the held-out documents as gzip packs them, to compare with.
      auto_class: of `transformers`, that loads what was trained.
    """
    speed = metrics.get('train/tokens_per_second')
    products = [name for name in ('export', 'adapter', 'checkpoints') if (workdir / name).is_dir()]
    products += [name for name in ('metrics.jsonl', 'samples.jsonl', 'report.html') if (workdir / name).is_file()]
    export = workdir / 'export'
    load = f"transformers.AutoModelFor{auto_class}.from_pretrained('{export}')" if export.is_dir() else ''
    console.facts(
        [
            ('reward', _number(reward, '.4f')),
            ('train loss', _number(metrics.get('train/loss'), '.4f')),
            ('held out', _held_out(metrics, gzip)),
            ('time', duration(info.seconds()) + (f', {speed:,.0f} tokens/s at the end' if speed else '')),
            ('made', f'{workdir}/: {", ".join(products)}; weights of update {exported}'),
            ('generate', _generate_command(workdir) if export.is_dir() and auto_class.endswith('LM') else ''),
            ('or load', load),
        ]
    )


def _generate_command(workdir: pathlib.Path) -> str:
    lines = (
        'python -m jaxtune.main --config configs/generate.py',
        f'--config.model.path={shlex.quote(str(workdir))} --config.data.eval=PROMPTS.jsonl',
    )
    return '\n'.join(lines) if len(lines[0]) + len(lines[1]) > console.WIDTH - 14 else ' '.join(lines)


def _mesh(info: RunInfo) -> str:
    sizes = {} if info.mesh is None else {name: size for name, size in info.mesh.shape.items() if size > 1}
    return ' x '.join(f'{name} {size}' for name, size in sizes.items()) or '1'


def _model_line(model: Mapping[str, Any] | None) -> str:
    if not model:
        return ''
    trains = 'all train' if model['trainable'] == model['parameters'] else f'{amount(model["trainable"])} train'
    shape = f'{model["layers"]} layers, d_model {model["d_model"]}'
    return f'{model["family"]}, {shape}, {amount(model["parameters"])} parameters, {trains}'


def _memory_line(model: Mapping[str, Any] | None, memory: Mapping[str, int]) -> str:
    parts = []
    if model:
        parts += [f'weights {size(model["weight_bytes"])}', f'optimizer {size(model["optimizer_bytes"])}']
        parts += [f'{size(model["copied_bytes"])} of them on every device'] if model['copied_bytes'] else []
    if memory:
        parts += [f'step {size(memory["temp_bytes"])} a device']
    return ', '.join(parts)


def _devices(machine: Mapping[str, Any]) -> str:
    hosts = f' on {machine["processes"]} hosts' if machine['processes'] > 1 else ''
    if machine['platform'] == 'cpu':
        return f'{machine["devices"]} x CPU ({machine["cores"]} cores, {machine["cpu"]}){hosts}'
    memory = f' ({size(machine["device_bytes"])} each)' if machine['device_bytes'] else ''
    return f'{machine["devices"]} x {machine["device_kind"]}{memory}{hosts}'


def _data_line(data: Mapping[str, Any]) -> str:
    names = tuple((name, name.replace('_', ' ')) for name in _DATA)
    return ', '.join(f'{amount(data[name])} {word}' for name, word in names if name in data)


def _mixture_line(mixture: Mapping[str, Mapping[str, float]]) -> str:
    return ', '.join(
        f'{label} {100 * source["share"]:.3g} % ({source["epochs"]:.3g} epochs)' for label, source in mixture.items()
    )


def _optimizer_line(settings: Settings) -> str:
    warmup = f' after {settings.warmup_steps} warm-up updates' if settings.warmup_steps else ''
    return f'{settings.name}, learning rate {settings.lr:g}, {settings.schedule}{warmup}'


def _number(value: float | None, spec: str) -> str:
    return '' if value is None else format(value, spec)


def _held_out(metrics: Mapping[str, Any], gzip: float | None) -> str:
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
