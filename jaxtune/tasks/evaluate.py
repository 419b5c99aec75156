"""`task=evaluate`: the objective's loss and accuracy on `data.eval`, by document."""

import math
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune import report
from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.metrics import names
from jaxtune.metrics.writer import MetricsWriter, peak_memory_bytes
from jaxtune.parallel import compiler_options, make_mesh
from jaxtune.parallel.batches import check_batch
from jaxtune.pretrained.load import ModelBundle, load_model
from jaxtune.recipe.flags import Command
from jaxtune.tasks import present, setup, specs, teacher
from jaxtune.training.evaluator import Evaluator, make_evaluator
from jaxtune.training.step import make_eval_step


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: the mesh does not divide the batch, or no data is named.
    """
    if not config.data.eval:
        raise UserError("data.eval='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")
    batch_size = config.eval.batch_size or config.train.batch_size
    check_batch(mesh, batch_size, 1, specs.objective(config).batch_spec())
    setup.position_bounds(config)
    present.check(config)


def open_evaluator(config: Settings, workdir: pathlib.Path, mesh: Mesh, bundle: ModelBundle) -> Evaluator:
    """What scores `data.eval` by the recipe's objective, for `score`.

    Raises:
      UserError: the data is wrong, or the mesh does not divide the batch.
    """
    check(config, mesh)
    objective, model = specs.objective(config), bundle.model
    batch_size = config.eval.batch_size or config.train.batch_size
    rows = objective.dataset('eval', bundle.tokenizer, workdir / 'cache', bundle.model.config.vocab_size)
    rows = setup.reference_logps(config, mesh, bundle, workdir / 'cache').complete(rows, 'eval')
    step = make_eval_step(lambda params, batch, rng: objective.loss(model, params, batch, rng))
    step = jax.jit(step, compiler_options=compiler_options())
    statistics = objective.statistics(model)
    bounds = setup.position_bounds(config)
    shared = teacher.load(config, mesh)
    return make_evaluator(
        objective.objective, mesh, rows, step, batch_size, statistics, config.eval.batches, bounds, shared
    )


def score(evaluator: Evaluator, params: Any) -> dict[str, float]:
    """Metrics of a whole parameter tree."""
    with console.progress(len(evaluator), 'evaluate', 'batch') as bar:
        return evaluator.run(params, jax.tree.map(lambda leaf: None, params), bar.advance)


def _by_position(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """The losses of all buckets of positions, a line each."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for name, value in metrics.items():
        if bounds := names.positions_of(name):
            found.setdefault(bounds, {})[name.split('/')[1].split('_')[0]] = value
    return [
        (f'at {low}-{high}', f'{values["loss"]:.4f} over {values["tokens"]:,} tokens' if 'loss' in values else 'none')
        for (low, high), values in found.items()
    ]


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Scores every held-out document; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the data or the model is wrong.
    """
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    info = setup.run_info(config, command, mesh)
    with jax.set_mesh(mesh):
        with info.timed('load'):
            bundle = load_model(specs.model_spec(config), mesh)
        with info.timed('data'):
            evaluator = open_evaluator(config, workdir, mesh, bundle)
        info.flops_per_token = setup.training_flops(config, bundle.model, specs.objective(config))
        info.describe_model(bundle.model, bundle.params, None, None)
        with info.timed('eval'):
            metrics = score(evaluator, bundle.params)
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
        [
            (name, f'{value:,}' if isinstance(value, int) else f'{value:.6g}')
            for name, value in metrics.items()
            if names.positions_of(name) is None
        ]
    )
    console.facts(_by_position(metrics))
    console.note(f'made {workdir}/result.json and {workdir}/report.html')
    return result
