"""`task=evaluate`: the objective's loss and accuracy on `data.eval`, by document."""

import functools
import pathlib

import jax
from ml_collections import ConfigDict

from jaxtune import console, objectives, runinfo
from jaxtune.assemble import assemble
from jaxtune.errors import UserError
from jaxtune.evaluator import make_evaluator
from jaxtune.metrics import MetricsWriter, peak_memory_bytes
from jaxtune.parallel import make_mesh
from jaxtune.parallel.batches import check_batch
from jaxtune.report import write_report
from jaxtune.step import make_eval_step
from jaxtune.workdir import write_result


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Scores every held-out document; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the data or the model is wrong.
    """
    if not config.data.eval:
        raise UserError("data.eval='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")
    objective = objectives.get(config.objective)
    mesh = make_mesh(config.mesh)
    batch_size = config.eval.batch_size or config.train.batch_size
    check_batch(mesh, batch_size, 1, objective.row(config))
    info = runinfo.RunInfo(command, config, mesh)
    with jax.set_mesh(mesh):
        with info.timed('load'):
            parts = assemble(config, mesh)
        with info.timed('data'):
            rows = objective.dataset(config, 'eval', parts.tokenizer, workdir / 'cache')
            rows = objectives.complete(config, rows, parts.model, parts.params, mesh, workdir / 'cache', 'eval')
        info.describe_model(parts.model, parts.params, None, None)
        step = jax.jit(make_eval_step(functools.partial(objective.loss, config, parts.model)))
        evaluator = make_evaluator(config, mesh, rows, step, batch_size)
        frozen = jax.tree.map(lambda leaf: None, parts.params)
        with info.timed('eval'), console.progress(len(evaluator), 'evaluate', 'batch') as bar:
            metrics = evaluator.run(parts.params, frozen, bar.advance)
    metrics['memory/peak_bytes'] = peak_memory_bytes()
    if not console.is_primary():
        return {'task': 'evaluate', 'status': 'done', 'step': 0, 'metrics': metrics}
    writer = MetricsWriter(workdir, wandb=config.log.wandb)
    writer.write(0, metrics)
    writer.close()
    info.write(workdir)
    result = write_result(workdir, 'evaluate', 0, metrics)
    write_report(workdir)
    console.facts(
        [(name, f'{value:,}' if isinstance(value, int) else f'{value:.6g}') for name, value in metrics.items()]
    )
    console.note(f'made {workdir}/result.json and {workdir}/report.html')
    return result
