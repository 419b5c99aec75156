"""`mesh.auto=True`: of the meshes that a machine allows, the one with the fastest update by the compiler's estimate."""

import concurrent.futures
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.formatting import short_time, size
from jaxtune.common.io import read_mapping, write_json
from jaxtune.common.settings import Settings
from jaxtune.cost import traffic
from jaxtune.errors import UserError
from jaxtune.parallel import hardware, hosts, make_mesh
from jaxtune.parallel.aot import available_bytes
from jaxtune.parallel.mesh import AXES
from jaxtune.tasks import ahead
from jaxtune.weights import tree

_COMPILED, _OPENED = 6, 24  # meshes at most, those that send least
NAME = 'mesh.json'


def mesh_of(config: Settings, devices: list[Any] | None, limit: int) -> Mesh:
    """The recipe's mesh, or with `mesh.auto` the best.

    Args:
      config: the recipe.
      devices: of `jax.Device`, to choose for; None = those that are here.
      limit: bytes that each has.

    Raises:
      UserError: no mesh divides the batch, or the recipe is wrong.
    """
    if not config.mesh.auto:
        return make_mesh(config.mesh, devices)
    return make_mesh(_choose(config, devices, limit), devices)


def stored_mesh(config: Settings, workdir: pathlib.Path) -> Mesh:
    """The mesh of a run on the devices that are here; what `mesh.auto` chose is kept for when the run goes on."""
    if not config.mesh.auto:
        return make_mesh(config.mesh)
    here = {'devices': jax.device_count(), 'device_kind': jax.devices()[0].device_kind}
    known = hosts.from_primary(lambda: read_mapping(workdir / NAME)) or {}
    if {name: known.get(name) for name in here} == here and math.prod(known['sizes'].values()) == here['devices']:
        return make_mesh(known['sizes'])
    sizes = _choose(config, None, int(0.92 * available_bytes()))
    if console.is_primary():
        write_json(workdir / NAME, here | {'sizes': sizes})
    return make_mesh(sizes)


def any_mesh(config: Settings, devices: list[Any] | None = None) -> Mesh:
    """A mesh that the recipe may run on, chosen without compiling: to check the rest of it."""
    if not config.mesh.auto:
        return make_mesh(config.mesh, devices)
    return make_mesh(next(_dividing(config, devices)), devices)


def candidates(count: int, fixed: dict[str, int]) -> Iterator[dict[str, int]]:
    """Sizes of all axes that multiply to a number of devices; those in `fixed` are as they are there."""
    free = [axis for axis in AXES if axis not in fixed]
    rest, left = divmod(count, math.prod(fixed.values()))
    divisors = [n for n in range(1, rest + 1) if rest % n == 0]
    for chosen in itertools.product(divisors, repeat=len(free)):
        if not left and math.prod(chosen) == rest:
            yield fixed | dict(zip(free, chosen, strict=True))


def _dividing(config: Settings, devices: list[Any] | None) -> Iterator[dict[str, int]]:
    """Candidates that divide the recipe's rows and length.

    Raises:
      UserError: there is none.
    """
    count = jax.device_count() if devices is None else len(devices)
    fixed = {axis: config.mesh[axis] for axis in AXES if config.mesh[axis] > 1}
    found = 0
    for sizes in candidates(count, fixed):
        try:
            ahead.check(config, make_mesh(sizes, devices))
        except UserError:
            continue
        found += 1
        yield sizes
    if not found:
        raise UserError(
            f'mesh.auto=True: no mesh of {count} devices divides train.batch_size={config.train.batch_size} and '
            f'data.seq_len={config.data.seq_len}; expected a multiple of the devices in one of them'
        )


def _choose(config: Settings, devices: list[Any] | None, limit: int) -> dict[str, int]:
    """Sizes of the axes: the fastest of the meshes that send least and hold the state, each compiled."""
    dividing = list(_dividing(config, devices))
    steps = _opened(config, devices, limit, dividing)
    together = 1 if jax.process_count() > 1 else hardware.cpu_cores()  # processes compile in the same order
    with concurrent.futures.ThreadPoolExecutor(together) as pool:
        tried = list(pool.map(_tried, steps))
    best = hosts.from_primary(lambda: min(range(len(tried)), key=lambda i: tried[i]))
    missing, seconds, peak = tried[best]
    estimate = f', {short_time(seconds)} an update' if seconds else ''
    console.note(
        f'mesh.auto: {shown(steps[best].mesh)}: {size(peak)} of {size(limit)} a device{estimate}, the best of '
        f'{len(tried)} compiled, of {len(dividing)} that divide the batch' + (': does not fit' if missing else '')
    )
    return {axis: steps[best].mesh.shape[axis] for axis in AXES}


def shown(mesh: Mesh) -> str:
    """A mesh in words: `fsdp 4 x tensor 2`."""
    return ' x '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'one device'


def _opened(
    config: Settings, devices: list[Any] | None, limit: int, dividing: list[dict[str, int]]
) -> list[ahead.Step]:
    """The steps to compile: those that send least, of those whose state a device holds where there are any.

    Raises:
      UserError: none of the meshes divides the model.
    """
    problems: list[UserError] = []

    def opened(choices: list[dict[str, int]]) -> Iterator[ahead.Step]:
        for sizes in choices:
            try:
                yield ahead.open_step(config, make_mesh(sizes, devices), limit)
            except UserError as error:  # experts or a width that it does not divide
                problems.append(error)

    work = next((_work(step) for step in opened(dividing)), None)
    if work is None:
        raise problems[0]
    ranked = sorted(dividing, key=lambda sizes: traffic.sent_bytes(work, sizes))
    roomy, tight = [], []
    for step in opened(ranked[:_OPENED]):
        (roomy if step.least_bytes() <= limit else tight).append(step)
        if len(roomy) == _COMPILED:
            break
    return roomy or tight[:_COMPILED]


def _work(step: ahead.Step) -> traffic.Work:
    """What the step moves, from its shapes."""
    config = step.model.config
    itemsize = jnp.dtype(step.config.model.compute_dtype).itemsize
    width, heads = config.d_model, getattr(config, 'num_kv_heads', config.num_heads)
    return traffic.Work(
        tree.nbytes((step.trainable, step.frozen)),
        tree.nbytes(step.trainable),
        config.num_layers,
        step.tokens() * width * itemsize,
        step.tokens() * 2 * heads * config.head_dim * itemsize,
    )


def _tried(step: ahead.Step) -> tuple[bool, float, int]:
    """Whether it lacks memory, its estimated seconds (0 where unknown) and its bytes a device: the least is best."""
    *_, attempt = step.attempts()
    speed = step.speed(attempt) if attempt.fits else None
    return not attempt.fits, speed.estimate.seconds if speed else 0.0, attempt.peak_bytes
