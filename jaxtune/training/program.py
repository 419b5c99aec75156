"""The training step of a run on a mesh, made from shapes alone: the same for training, resuming and compiling ahead.

Nothing here touches data or allocates a parameter; `train` gives it arrays, `compile` and `export` give it shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtune.common.settings import Settings
from jaxtune.methods import BoundMethod, apply
from jaxtune.models import Model
from jaxtune.models.frozen import FrozenModel
from jaxtune.optim import offload
from jaxtune.optim.optimizers import make_optimizer, schedule
from jaxtune.parallel import batch_sharding, compiler_options, match_rules, shardings, state_specs
from jaxtune.parallel.rules import with_shardings
from jaxtune.training.balance import Balance
from jaxtune.training.step import State, Statistics, Sums, init_state, make_eval_step, make_train_step


class Learning(Protocol):
    """What an update learns: a `BoundObjective`, or a `BoundAlgorithm` of reinforcement learning."""

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What one row of a batch holds."""
        ...

    def loss(self, model: Model, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Sums:
        """The summed loss of a batch."""
        ...

    def statistics(self, model: Model) -> Statistics | None:
        """What the loss must know of the whole batch before it."""
        ...


@dataclasses.dataclass(frozen=True)
class Program:
    """One run's step and state.

    Attributes:
      mesh: where it runs.
      model: without its parameters.
      learning: what is learnt.
      settings: the recipe's `optimizer` subtree.
      optimizer: the update rule.
      steps: updates of the whole run.
      batch_size: sequences an update.
      seed: of what an update draws.
      shapes: the state as `jax.ShapeDtypeStruct`s.
      placed: the state's shardings.
      balance: how experts are kept evenly used.
      shared: what the loss finds in every batch beside its rows: a frozen model that it asks, arrays or shapes.
    """

    mesh: Mesh
    model: Model
    learning: Learning
    settings: Settings
    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    seed: int
    shapes: Any
    placed: Any
    balance: Balance
    shared: Mapping[str, FrozenModel] = dataclasses.field(default_factory=dict)

    def loss(self, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Sums:
        """The loss of this model, as sums."""
        return self.learning.loss(self.model, params, batch, rng)

    @property
    def statistics(self) -> Statistics | None:
        """What the loss must know of the whole batch."""
        return self.learning.statistics(self.model)

    def init_state(self, trainable: Any) -> State:
        """The state before the first update, on the mesh."""
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.placed['opt_state'])(trainable)
        step = jax.device_put(np.zeros((), np.int32), self.placed['step'])
        return {'step': step, 'trainable': trainable, 'opt_state': opt_state}

    def batch_shapes(self) -> dict[str, Any]:
        """The global batch of an update, with where it lies, and what is shared."""
        rows = {
            name: jax.ShapeDtypeStruct(
                (self.batch_size, *field.shape), field.dtype, sharding=batch_sharding(self.mesh, 1 + len(field.shape))
            )
            for name, field in self.learning.batch_spec().items()
        }
        return {**rows, **self.shared}

    def train_step(self, accumulate: int) -> Any:
        """The jitted update `(state, frozen, batch) -> (state, metrics)`; the state is donated."""
        step = make_train_step(
            functools.partial(self.balance.loss, self.learning, self.model),
            self.optimizer,
            schedule(self.settings, self.steps),
            seed=self.seed,
            accumulate=accumulate,
            clip_norm=self.settings.clip_norm,
            statistics=self.statistics,
            settle=self.balance.settle,
            update=self._update_layers if self.settings.offload else None,
        )
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self.placed, None),
            compiler_options=compiler_options(self.mesh),
        )

    def _update_layers(self, *given: Any) -> tuple[Any, Any]:
        places = (self.placed['trainable'], self.placed['opt_state'])
        return offload.update_layers(self.optimizer, *given, places=places)

    def eval_step(self) -> Callable:
        """The jitted evaluation of one batch `(trainable, frozen, batch) -> sums`."""
        return jax.jit(make_eval_step(self.loss), compiler_options=compiler_options())


def make_program(
    mesh: Mesh,
    model: Model,
    trainable: Any,
    learning: Learning,
    *,
    optimizer: Settings,
    steps: int,
    batch_size: int,
    seed: int = 0,
    method: BoundMethod | None = None,
    newly_initialized: frozenset[str] = frozenset(),
    balance: Balance | None = None,
    shared: Mapping[str, FrozenModel] | None = None,
) -> Program:
    """The program of a run.

    Args:
      mesh: the mesh that is set.
      model: the model.
      trainable: the half of the tree that trains: arrays or shapes.
      learning: what is learnt.
      optimizer: the recipe's `optimizer` subtree.
      steps: updates of the whole run.
      batch_size: sequences an update.
      seed: of what an update draws.
      method: which may have learning rates of its own.
      newly_initialized: paths of parameters that the loaded model lacked.
      balance: how experts are kept evenly used; None = left alone.
      shared: what the loss finds in every batch beside its rows.

    Raises:
      UserError: an optimizer or sharding that cannot be.
    """
    rate = method.rate if method and method.method.rate else None
    kept = balance or Balance()
    rule = make_optimizer(optimizer, steps, newly_initialized=newly_initialized, rate=rate)
    specs = match_rules(trainable, mesh)
    shapes = jax.eval_shape(lambda tree: init_state(tree, rule), trainable)
    opt_specs = state_specs(shapes['opt_state'], trainable, specs)
    placed = shardings({'step': P(), 'trainable': specs, 'opt_state': opt_specs}, mesh)
    if optimizer.offload:
        placed['opt_state'] = offload.on_host(shapes['opt_state'], placed['opt_state'])
    return Program(mesh, model, learning, optimizer, rule, steps, batch_size, seed, shapes, placed, kept, shared or {})


def abstract_params(
    method: BoundMethod, mesh: Mesh, model: Model, grow: Callable[[Any], Any] | None = None
) -> tuple[Any, Any]:
    """`(trainable, frozen)` of a method as `jax.ShapeDtypeStruct`s with their shardings.

    Args:
      method: the method.
      mesh: where they lie.
      model: the model as its folder has it.
      grow: what adds rows for new tokens to the method's tree, or None.
    """
    codecs = apply.codecs(method, model)

    def begin(params: Any) -> Any:
        params = apply.begin(method, model, apply.encoded(params, codecs), frozenset())
        return grow(params) if grow else params

    params = jax.eval_shape(begin, model.shapes)
    placed = with_shardings(params, shardings(match_rules(params, mesh), mesh))
    return apply.partition(method.method, placed, apply.also_trained(method, model))
