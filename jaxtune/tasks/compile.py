"""`task=compile`: the training step compiled ahead of time for hardware that need not be there, and whether it fits."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune import report
from jaxtune.common import console
from jaxtune.common.formatting import amount, duration, size
from jaxtune.common.io import write_json
from jaxtune.common.settings import Settings
from jaxtune.data.tokenizer import Added
from jaxtune.methods import apply, new_tokens
from jaxtune.models import Model
from jaxtune.parallel import batch_shards, copied_bytes, make_mesh
from jaxtune.parallel.aot import available_bytes, try_compile
from jaxtune.parallel.batches import check_batch
from jaxtune.parallel.rules import with_shardings
from jaxtune.parallel.topology import topology_devices, usable_bytes
from jaxtune.pretrained.load import announce_config, open_model, open_with_added, plan_tokens, with_new_tokens
from jaxtune.recipe.flags import Command
from jaxtune.tasks import setup, specs
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


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Compiles, reports, and returns `result.json`'s content; `compile.json` holds its metrics.

    No weights are read and no parameter is allocated. That it does not fit is a result, not an error.

    Raises:
      UserError: the recipe, the topology or the model is wrong.
    """
    name = config.compile.topology
    mesh = target_mesh(config)
    limit = usable_bytes(name) if name else int(0.92 * available_bytes())
    check(config, mesh)
    info = setup.run_info(config, command, mesh)
    model, trainable, frozen, program = open_program(config, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        opt_state = with_shardings(program.shapes['opt_state'], program.placed['opt_state'])
        info.flops_per_token = setup.training_flops(config, model, specs.objective(config))
        info.describe_model(model, (trainable, frozen), trainable, opt_state)
        copied = copied_bytes((trainable, frozen, opt_state))
        attempt = None
        for count in _micro_batches(config, mesh):
            with info.timed('compile'):
                attempt = compile_for(program, frozen, count, limit)
            console.note(
                f'train.accumulate={count}: needs {size(attempt.peak_bytes)} of {size(limit)} a device, '
                f'compiled in {duration(attempt.seconds)}'
            )
            if attempt.fits:
                break
        assert attempt is not None  # there is one micro-batch at least
    costed = (model, specs.method(config).method, config.data.seq_len, specs.objective(config).batch_spec())
    flops = causal_flops_per_token(*costed) * info.tokens_per_step
    speed = measure(attempt.text, mesh, model, config.data.seq_len, info.tokens_per_step, flops)
    metrics = {
        'fits': attempt.fits,
        'peak_bytes_per_device': attempt.peak_bytes,
        'argument_bytes': attempt.argument_bytes,
        'temp_bytes': attempt.temp_bytes,
        'seconds_to_compile': round(attempt.seconds, 2),
        # XLA's own count has the body of the scan over layers once.
        'flops_per_step': flops_per_token(*costed) * info.tokens_per_step,
        **(speed.metrics() if speed else {}),
    }
    if not console.is_primary():
        return {'task': 'compile', 'status': 'done', 'step': 0, 'metrics': metrics}
    _show(config, mesh, model, attempt, limit, metrics, speed, copied)
    beside = {
        'accumulate': attempt.accumulate,
        'attention': list(model.kernels.names),
        'available_bytes': limit,
        'device_kind': mesh.devices.flat[0].device_kind,
        'experts': list(model.kernels.experts),
        'mesh': dict(mesh.shape),
        'products': model.kernels.products,
        **(speed.details() if speed else {}),
    }
    write_json(workdir / 'compile.json', metrics | beside)
    info.write(workdir)
    result = report.finish(workdir, 'compile', 0, metrics | {'accumulate': attempt.accumulate})
    console.note(json.dumps(metrics))
    return result


def target_mesh(config: Settings) -> Mesh:
    """The mesh that the recipe compiles for, of devices that need not be there."""
    name = config.compile.topology
    return make_mesh(config.mesh, topology_devices(name) if name else None)


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: sizes that the mesh cannot divide.
    """
    row = specs.objective(config).batch_spec()
    check_batch(mesh, config.train.batch_size, next(_micro_batches(config, mesh)), row)


def open_program(config: Settings, mesh: Mesh) -> tuple[Model, Any, Any, Program]:
    """The model, its trainable and frozen half as shapes, and its step."""
    # Before the mesh is set: nothing could run on devices that are not there, not even the making of a random key.
    spec, method = specs.model_spec(config), specs.method(config)
    tokenizer, added = _tokenizer(config)
    announce_config(spec)
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
        )
    return model, trainable, frozen, program


def _micro_batches(config: Settings, mesh: Mesh) -> Iterator[int]:
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


def compile_for(program: Program, frozen: Any, accumulate: int, limit: int) -> Attempt:
    """Compiles the step of a program for its mesh.

    Args:
      program: the recipe's step and state.
      frozen: shapes of the parameters that do not train, with their shardings.
      accumulate: micro-batches an update.
      limit: bytes that a device has for it.
    """
    args = (with_shardings(program.shapes, program.placed), frozen, program.batch_shapes())
    start = time.perf_counter()
    lowered = program.train_step(accumulate).lower(*args)
    compiled, needed = try_compile(lowered, limit)
    seconds = time.perf_counter() - start
    if compiled is None:
        argument = _bytes_on_a_device(args)
        return Attempt(accumulate, False, needed, argument, max(needed - argument, 0), seconds, '')
    memory = compiled_memory(compiled)
    return Attempt(
        accumulate,
        needed <= limit,
        needed,
        memory['argument_bytes'],
        memory['temp_bytes'],
        seconds,
        _text(compiled),
    )


def _text(compiled: jax.stages.Compiled) -> str:
    try:
        return compiled.as_text() or ''
    except jax.errors.JaxRuntimeError:
        console.note('speed: not estimated: this jaxlib cannot read what the compiler made')
        return ''


def _bytes_on_a_device(args: Any) -> int:
    sizes = (leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(args))
    return sum(sizes)


def _show(
    config: Settings,
    mesh: Mesh,
    model: Model,
    attempt: Attempt,
    limit: int,
    metrics: dict,
    speed: Speed | None,
    copied: int,
) -> None:
    sizes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
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
        ]
    )
