"""`task=evaluate`: the objective's loss and accuracy on `data.eval`, by document."""

import functools
import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import objectives, report
from jaxtune.common import console
from jaxtune.errors import UserError
from jaxtune.metrics.writer import MetricsWriter, peak_memory_bytes
from jaxtune.parallel import compiler_options, make_mesh
from jaxtune.parallel.batches import check_batch
from jaxtune.pretrained.load import Assembly, assemble
from jaxtune.tasks import present
from jaxtune.training import run_info
from jaxtune.training.evaluator import Evaluator, make_evaluator
from jaxtune.training.step import make_eval_step


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: the mesh does not divide the batch, or no data is named.
    """
    if not config.data.eval:
        raise UserError("data.eval='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")
    batch_size = config.eval.batch_size or config.train.batch_size
    check_batch(mesh, batch_size, 1, objectives.get(config.objective).row(config))
    present.check(config)


def open_evaluator(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, parts: Assembly) -> Evaluator:
    """What scores `data.eval` by the recipe's objective, for `score`.

    Raises:
      UserError: the data is wrong, or the mesh does not divide the batch.
    """
    check(config, mesh)
    objective = objectives.get(config.objective)
    batch_size = config.eval.batch_size or config.train.batch_size
    rows = objective.dataset(config, 'eval', parts.tokenizer, workdir / 'cache')
    rows = objectives.complete(config, rows, parts.model, parts.params, mesh, workdir / 'cache', 'eval')
    loss = functools.partial(objective.loss, config, parts.model)
    step = jax.jit(make_eval_step(loss), compiler_options=compiler_options())
    statistics = objectives.statistics(objective, config, parts.model)
    return make_evaluator(config, mesh, rows, step, batch_size, statistics)


def score(evaluator: Evaluator, params: Any) -> dict[str, float]:
    """Metrics of a whole parameter tree."""
    with console.progress(len(evaluator), 'evaluate', 'batch') as bar:
        return evaluator.run(params, jax.tree.map(lambda leaf: None, params), bar.advance)


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Scores every held-out document; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the data or the model is wrong.
    """
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    info = run_info.RunInfo(command, config, mesh)
    with jax.set_mesh(mesh):
        with info.timed('load'):
            parts = assemble(config, mesh)
        with info.timed('data'):
            evaluator = open_evaluator(config, workdir, mesh, parts)
        info.describe_model(parts.model, parts.params, None, None)
        with info.timed('eval'):
            metrics = score(evaluator, parts.params)
    if not math.isfinite(metrics['eval/loss']):
        raise UserError(
            f'model.path={config.model.path}: eval/loss is {metrics["eval/loss"]}; expected weights that are finite '
            'numbers, or model.compute_dtype=float32'
        )
    metrics['memory/peak_bytes'] = peak_memory_bytes()
    if not console.is_primary():
        return {'task': 'evaluate', 'status': 'done', 'step': 0, 'metrics': metrics}
    writer = MetricsWriter(workdir, wandb=config.log.wandb)
    writer.write(0, metrics)
    writer.close()
    info.write(workdir)
    result = report.finish(workdir, 'evaluate', 0, metrics)
    console.facts(
        [(name, f'{value:,}' if isinstance(value, int) else f'{value:.6g}') for name, value in metrics.items()]
    )
    console.note(f'made {workdir}/result.json and {workdir}/report.html')
    return result
