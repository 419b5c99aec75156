"""The training step of a recipe compiled ahead of time: its model as shapes, its memory, its speed.

No weights are read and no parameter is allocated.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.data.tokenizer import Added
from jaxtune.errors import UserError
from jaxtune.methods import apply, new_tokens
from jaxtune.models import Model
from jaxtune.parallel import batch_shards, make_mesh
from jaxtune.parallel.aot import available_bytes, try_compile
from jaxtune.parallel.batches import check_batch
from jaxtune.parallel.rules import with_shardings
from jaxtune.parallel.topology import topology_devices, usable_bytes
from jaxtune.pretrained.load import open_model, open_with_added, plan_tokens, with_new_tokens
from jaxtune.tasks import specs, teacher
from jaxtune.tasks.speed import Speed, measure
from jaxtune.training.flops import causal_flops_per_token, flops_per_token
from jaxtune.training.program import Program, abstract_params, make_program
from jaxtune.training.run_info import compiled_memory

# The schedule must end somewhere; the compiled step is the same wherever it does.
_SOME_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the compiler said of one way to cut the batch.

    Attributes:
      accumulate: micro-batches an update.
      fits: whether a device holds it.
      peak_bytes: what a device needs: arguments, outputs that reuse no argument, temporaries.
      argument_bytes: state, frozen parameters and batch on a device.
      temp_bytes: activations, gradients and the like.
      seconds: to trace and compile.
      text: the compiled program; '' where the compiler gave up for lack of memory, or jaxlib cannot read it.
    """

    accumulate: int
    fits: bool
    peak_bytes: int
    argument_bytes: int
    temp_bytes: int
    seconds: float
    text: str


@dataclasses.dataclass(frozen=True)
class Step:
    """A recipe's training step on a mesh, ready to compile.

    Attributes:
      config: the recipe.
      mesh: of devices that need not be there.
      limit: bytes that a device has for it.
      model: without its parameters.
      trainable: shapes of what trains, with their shardings.
      frozen: the same of what does not.
      program: the update and its state.
    """

    config: Settings
    mesh: Mesh
    limit: int
    model: Model
    trainable: Any
    frozen: Any
    program: Program

    def arguments(self) -> tuple[Any, Any, Any]:
        """State, frozen parameters and batch as shapes with their shardings."""
        return with_shardings(self.program.shapes, self.program.placed), self.frozen, self.program.batch_shapes()

    def least_bytes(self) -> int:
        """What a device holds at least, without compiling: the arguments, and the gradients where all are clipped."""
        state, frozen, batch = self.arguments()
        return _bytes_on_a_device((state, frozen, batch)) + (
            _bytes_on_a_device(self.trainable) if self.config.optimizer.clip_norm else 0
        )

    def tokens(self) -> int:
        """Of an update, padding included."""
        rows = specs.objective(self.config).objective.rows_per_example
        return self.config.train.batch_size * rows * self.config.data.seq_len

    def flops(self) -> float:
        """Of an update on all devices together, masked scores counted."""
        return flops_per_token(*self._costed()) * self.tokens()

    def speed(self, attempt: Attempt) -> Speed | None:
        """The update's speed; None where it cannot be estimated, which is said in a line."""
        flops = causal_flops_per_token(*self._costed()) * self.tokens()
        return measure(attempt.text, self.mesh, self.model, self.config.data.seq_len, self.tokens(), flops)

    def _costed(self) -> tuple:
        spec = specs.objective(self.config).batch_spec()
        asked = [frozen.model for frozen in self.program.shared.values()]
        return self.model, specs.method(self.config).method, self.config.data.seq_len, spec, asked

    def attempts(self) -> Iterator[Attempt]:
        """Compiles with each number of micro-batches until one fits.

        Raises:
          UserError: the compiler fails.
        """
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            for count in micro_batches(self.config, self.mesh):
                attempt = self._compile(count)
                yield attempt
                if attempt.fits:
                    return

    def _compile(self, accumulate: int) -> Attempt:
        args = self.arguments()
        start = time.perf_counter()
        lowered = self.program.train_step(accumulate).lower(*args)
        try:
            compiled, needed = try_compile(lowered, self.limit)
        except jax.errors.JaxRuntimeError as error:  # a fault of the compiler's own
            where = self.config.compile.topology or jax.default_backend()
            raise UserError(f'the compiler for {where} fails over this step: {str(error).splitlines()[0]}') from error
        seconds = time.perf_counter() - start
        if compiled is None:
            argument = _bytes_on_a_device(args)
            return Attempt(accumulate, False, needed, argument, max(needed - argument, 0), seconds, '')
        memory = compiled_memory(compiled)
        argument, temp = memory['argument_bytes'], memory['temp_bytes']
        return Attempt(accumulate, needed <= self.limit, needed, argument, temp, seconds, _text(compiled))


def open_step(config: Settings, mesh: Mesh, limit: int) -> Step:
    """The model, its two halves as shapes, and its update.

    Args:
      config: the recipe.
      mesh: to compile for.
      limit: bytes that a device has for it.

    Raises:
      UserError: the recipe or the model is wrong.
    """
    # Before the mesh is set: nothing could run on devices that are not there, not even the making of a random key.
    spec, method = specs.model_spec(config), specs.method(config)
    tokenizer, added = _tokenizer(config)
    stored, _ = open_model(spec, tokenizer)
    new = plan_tokens(spec, tokenizer, added, stored)
    model = with_new_tokens(spec, tokenizer, stored, [new])
    if new:
        new_tokens.check(method)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        whole = apply.also_trained(method, stored)
        grow = (lambda params: new_tokens.grow(params, model, new, method, whole)) if new else None
        trainable, frozen = abstract_params(method, mesh, stored, grow)
        program = make_program(
            mesh,
            model,
            trainable,
            specs.objective(config),
            optimizer=config.optimizer,
            steps=config.train.steps or _SOME_STEPS,
            batch_size=config.train.batch_size,
            seed=config.seed,
            method=method,
            balance=specs.balance(config, mesh, model),
            shared=teacher.shapes(config, mesh),
        )
    if config.optimizer.offload and not any(map(_on_host, jax.tree.leaves(program.placed['opt_state']))):
        console.note(
            "optimizer.offload: JAX knows no host memory of this hardware ahead: the state counts as a device's"
        )
    return Step(config, mesh, limit, model, trainable, frozen, program)


def target(config: Settings) -> tuple[list[Any] | None, int]:
    """The devices (`jax.Device`) that the recipe compiles for, None for those that are here, and each one's bytes.

    Raises:
      UserError: no such hardware.
    """
    name = config.compile.topology
    return (topology_devices(name), usable_bytes(name)) if name else (None, int(0.92 * available_bytes()))


def target_mesh(config: Settings) -> Mesh:
    """The mesh that the recipe compiles for, of devices that need not be there."""
    return make_mesh(config.mesh, target(config)[0])


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: sizes that the mesh cannot divide.
    """
    row = specs.objective(config).batch_spec()
    check_batch(mesh, config.train.batch_size, next(micro_batches(config, mesh)), row)


def micro_batches(config: Settings, mesh: Mesh) -> Iterator[int]:
    """The numbers of micro-batches to try: the recipe's, or each that divides a device's rows."""
    if config.train.accumulate != 'auto':
        yield config.train.accumulate
        return
    rows = config.train.batch_size // batch_shards(mesh)
    yield from (n for n in range(1, max(rows, 1) + 1) if rows % n == 0)


def _tokenizer(config: Settings) -> tuple[Any, tuple[Added, ...]]:
    """The tokenizer with what it was given, where the recipe names one or the vocabulary depends on it; else None."""
    known = (config.model.path or 'vocab_size' in config.model.config) and not config.tokenizer.add
    return open_with_added(specs.model_spec(config)) if config.tokenizer.path or not known else (None, ())


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text() or ''
    except jax.errors.JaxRuntimeError:
        console.note('speed: not estimated: this jaxlib cannot read what the compiler made')
        return ''


def _bytes_on_a_device(args: Any) -> int:
    held = [leaf for leaf in jax.tree.leaves(args) if not _on_host(leaf.sharding)]
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in held)


def _on_host(sharding: jax.sharding.Sharding) -> bool:
    return sharding.memory_kind == 'pinned_host'
