"""The training step of a recipe on a mesh, made from shapes alone: the same for training, resuming and compiling ahead.

Nothing here touches data or allocates a parameter; `train` gives it arrays, `compile` and `export` give it shapes.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune import methods, objectives
from jaxtune.methods import apply
from jaxtune.models import Model
from jaxtune.optim.optimizers import make_optimizer, schedule
from jaxtune.parallel import batch_sharding, compiler_options, match_rules, shardings, state_specs
from jaxtune.parallel.rules import with_shardings
from jaxtune.training.step import State, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """One recipe's step and state.

    Attributes:
      config: the recipe.
      mesh: where it runs.
      model: without its parameters.
      objective: its module.
      optimizer: the update rule.
      steps: updates of the whole run.
      shapes: the state as `jax.ShapeDtypeStruct`s.
      placed: the state's shardings.
    """

    config: ConfigDict
    mesh: Mesh
    model: Model
    objective: ModuleType
    optimizer: optax.GradientTransformation
    steps: int
    shapes: Any
    placed: Any

    def loss(self, params, batch, rng):
        """The objective's loss of this model, as sums."""
        return self.objective.loss(self.config, self.model, params, batch, rng)

    @property
    def statistics(self) -> Callable | None:
        """What the objective's loss must know of the whole batch; see `objectives`."""
        return objectives.statistics(self.objective, self.config, self.model)

    def init_state(self, trainable) -> State:
        """The state before the first update, on the mesh."""
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.placed['opt_state'])(trainable)
        step = jax.device_put(np.zeros((), np.int32), self.placed['step'])
        return {'step': step, 'trainable': trainable, 'opt_state': opt_state}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch of an update, with where it lies."""
        rows = self.config.train.batch_size
        return {
            name: jax.ShapeDtypeStruct(
                (rows, *field.shape), field.dtype, sharding=batch_sharding(self.mesh, 1 + len(field.shape))
            )
            for name, field in self.objective.row(self.config).items()
        }

    def train_step(self, accumulate: int) -> Callable:
        """The jitted update `(state, frozen, batch) -> (state, metrics)`; the state is donated."""
        step = make_train_step(
            self.loss,
            self.optimizer,
            schedule(self.config.optimizer, self.steps),
            seed=self.config.seed,
            accumulate=accumulate,
            clip_norm=self.config.optimizer.clip_norm,
            statistics=self.statistics,
        )
        jit = functools.partial(
            jax.jit, donate_argnums=0, out_shardings=(self.placed, None), compiler_options=compiler_options()
        )
        if not self.config.optimizer.offload:
            return jit(step)
        on_device = jax.tree.map(lambda place: place.with_memory_kind('device'), self.placed['opt_state'])

        def offloaded(state, frozen, batch):
            return step({**state, 'opt_state': jax.device_put(state['opt_state'], on_device)}, frozen, batch)

        return jit(offloaded)

    def eval_step(self) -> Callable:
        """The jitted evaluation of one batch `(trainable, frozen, batch) -> sums`."""
        return jax.jit(make_eval_step(self.loss), compiler_options=compiler_options())


def make_program(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    trainable: Any,
    steps: int,
    fresh: frozenset[str] = frozenset(),
    objective: ModuleType | None = None,
) -> Program:
    """The program of a recipe.

    Args:
      config: the recipe.
      mesh: the mesh that is set.
      model: the model.
      trainable: the half of the tree that trains: arrays or shapes.
      steps: updates of the whole run.
      fresh: paths of parameters that the loaded model lacked.
      objective: what is learnt (see `objectives`), where not `config.objective`.

    Raises:
      UserError: an objective, optimizer or sharding that cannot be.
    """
    rate = getattr(methods.get(config.method.name), 'rate', None)
    factors = {
        'newly_initialized': fresh,
        'rate': None if rate is None else functools.partial(rate, config=config.method),
    }
    optimizer = make_optimizer(config.optimizer, steps, **factors)
    specs = match_rules(trainable, mesh)
    shapes = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    opt_specs = state_specs(shapes['opt_state'], trainable, specs)
    placed = shardings({'step': P(), 'trainable': specs, 'opt_state': opt_specs}, mesh)
    if config.optimizer.offload:
        placed['opt_state'] = jax.tree.map(lambda place: place.with_memory_kind('pinned_host'), placed['opt_state'])
    objective = objective or objectives.get(config.objective)
    return Program(config, mesh, model, objective, optimizer, steps, shapes, placed)


def abstract_params(config: ConfigDict, mesh: Mesh, model: Model) -> tuple[Any, Any]:
    """`(trainable, frozen)` of a recipe as `jax.ShapeDtypeStruct`s with their shardings."""
    codecs = apply.codecs(config, model)
    params = jax.eval_shape(
        lambda params: apply.begin(config, model, apply.encoded(params, codecs), frozenset()), model.shapes
    )
    return apply.partition(config, with_shardings(params, shardings(match_rules(params, mesh), mesh)), frozenset())
