"""`task=compile`: the training step compiled ahead of time for hardware that need not be there, and whether it fits."""

import json
import pathlib
from typing import Any

import jax

from jaxtune import report
from jaxtune.common import console
from jaxtune.common.formatting import amount, duration, size
from jaxtune.common.io import write_json
from jaxtune.common.settings import Settings
from jaxtune.parallel import copied_bytes
from jaxtune.parallel.rules import with_shardings
from jaxtune.pretrained.load import announce_config
from jaxtune.recipe.flags import Command
from jaxtune.tasks import ahead, fit, mesh_choice, setup, specs
from jaxtune.tasks.ahead import Attempt, Step
from jaxtune.tasks.speed import Speed


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Compiles, reports, and returns `result.json`'s content; `compile.json` holds its metrics.

    Several topologies, methods or lengths make a table (`tasks.fit`). No weights are read and no parameter is
    allocated. That it does not fit is a result, not an error.

    Raises:
      UserError: the recipe, the topology or the model is wrong.
    """
    if fit.is_table(config):
        return fit.run(config, workdir, command)
    devices, limit = ahead.target(config)
    mesh = mesh_choice.mesh_of(config, devices, limit)
    ahead.check(config, mesh)
    info = setup.run_info(config, command, mesh)
    announce_config(specs.model_spec(config))
    step = ahead.open_step(config, mesh, limit)
    opt_state = with_shardings(step.program.shapes['opt_state'], step.program.placed['opt_state'])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        info.flops_per_token = setup.training_flops(config, step.model, specs.objective(config), step.program.shared)
        info.describe_model(step.model, (step.trainable, step.frozen), step.trainable, opt_state)
        copied = copied_bytes((step.trainable, step.frozen, opt_state))
    attempt = None
    with info.timed('compile'):
        for attempt in step.attempts():
            console.note(
                f'train.accumulate={attempt.accumulate}: needs {size(attempt.peak_bytes)} of {size(limit)} a device, '
                f'compiled in {duration(attempt.seconds)}'
            )
    assert attempt is not None  # there is one micro-batch at least
    speed = step.speed(attempt)
    metrics = {
        'fits': attempt.fits,
        'peak_bytes_per_device': attempt.peak_bytes,
        'argument_bytes': attempt.argument_bytes,
        'temp_bytes': attempt.temp_bytes,
        'seconds_to_compile': round(attempt.seconds, 2),
        # XLA's own count has the body of the scan over layers once.
        'flops_per_step': step.flops(),
        **(speed.metrics() if speed else {}),
    }
    if not console.is_primary():
        return {'task': 'compile', 'status': 'done', 'step': 0, 'metrics': metrics}
    _show(step, attempt, metrics, speed, copied)
    beside = {
        'accumulate': attempt.accumulate,
        'attention': list(step.model.kernels.names),
        'available_bytes': limit,
        'device_kind': mesh.devices.flat[0].device_kind,
        'experts': list(step.model.kernels.experts),
        'mesh': dict(mesh.shape),
        'products': step.model.kernels.products,
        **(speed.details() if speed else {}),
    }
    write_json(workdir / 'compile.json', metrics | beside)
    info.write(workdir)
    result = report.finish(workdir, 'compile', 0, metrics | {'accumulate': attempt.accumulate})
    console.note(json.dumps(metrics))
    return result


def _show(step: Step, attempt: Attempt, metrics: dict, speed: Speed | None, copied: int) -> None:
    config, mesh, model, limit = step.config, step.mesh, step.model, step.limit
    sizes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
    slices = len({getattr(device, 'slice_index', 0) for device in mesh.devices.flat})
    console.facts(
        [
            ('devices', f'{mesh.size} x {mesh.devices.flat[0].device_kind}' + (f'; mesh {sizes}' if sizes else '')),
            ('attention', str(model.kernels)),
            ('experts', ', '.join(model.kernels.experts)),
            ('products', model.kernels.products_line),
            ('batch', f'{config.train.batch_size} x {config.data.seq_len} in {attempt.accumulate} micro-batches'),
            ('arguments', f'{size(attempt.argument_bytes)} a device: state, frozen parameters, batch'),
            ('of them', f'{size(copied)} copied to every device' if copied else ''),
            ('temporaries', f'{size(attempt.temp_bytes)} a device'),
            ('peak', f'{size(attempt.peak_bytes)} of {size(limit)}: {"fits" if attempt.fits else "does not fit"}'),
            ('work', f'{amount(metrics["flops_per_step"])}FLOP an update'),
            *(speed.facts() if speed else ()),
            ('slices', f'{slices}; the time of what they send each other is not estimated' if slices > 1 else ''),
        ]
    )
