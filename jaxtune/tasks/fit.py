"""What fits where: a table of topologies by methods by lengths, each cell compiled, with advice for what does not fit.

A cell that is done is kept in the workdir, so that the same command goes on after a stop.
"""

import concurrent.futures
import copy
import dataclasses
import itertools
import json
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune import report
from jaxtune.common import console
from jaxtune.common.formatting import short_time
from jaxtune.common.io import read_mapping, write_json
from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.methods import METHODS
from jaxtune.parallel import hardware
from jaxtune.pretrained.load import announce_config
from jaxtune.recipe import recipes
from jaxtune.recipe.flags import Command
from jaxtune.report import fits
from jaxtune.tasks import advice, ahead, mesh_choice, setup, specs
from jaxtune.tasks.advice import Changes, Outcome

_DONE = 'cells.json'


def is_table(config: Settings) -> bool:
    """Whether a recipe asks for several topologies, methods or lengths."""
    return len(_topologies(config)) > 1 or bool(config.compile.methods) or bool(config.compile.seq_lens)


def cells(config: Settings) -> list[Settings]:
    """The recipe of each cell, topology by topology.

    Raises:
      UserError: an unknown method, or several topologies of which one is not named.
    """
    methods = config.compile.methods or config.method.name
    methods = methods.split(',') if isinstance(methods, str) else methods
    lengths = config.compile.seq_lens or (config.data.seq_len,)
    found = []
    for topology, method, length in itertools.product(_topologies(config), methods, lengths):
        if method.strip() not in METHODS.names:
            raise UserError(f'compile.methods={method.strip()!r}: expected some of {", ".join(METHODS.names)}')
        changes = {'compile.topology': topology, 'method.name': method.strip(), 'data.seq_len': length}
        found.append(_changed(config, changes | {'compile.methods': '', 'compile.seq_lens': ''}))
    return found


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Compiles every cell, prints the table, and returns `result.json`'s content; `compile.json` holds the cells.

    Raises:
      UserError: the recipe, a topology or the model is wrong.
    """
    recipe = cells(config)
    info = setup.run_info(config, command, None)
    announce_config(specs.model_spec(config))
    cached = _Cells(workdir, len(recipe))
    with info.timed('compile'), concurrent.futures.ThreadPoolExecutor(hardware.cpu_cores()) as pool:
        rows = list(pool.map(cached.row, recipe))
    _show(rows)
    fitting = sum(row['fits'] for row in rows)
    metrics = {'cells': len(rows), 'fitting': fitting, 'with_advice': sum(bool(row.get('advice')) for row in rows)}
    write_json(workdir / 'compile.json', {'cells': rows})
    info.write(workdir)
    return report.finish(workdir, 'compile', 0, metrics)


def _topologies(config: Settings) -> list[str]:
    return [name.strip() for name in config.compile.topology.split(',')]


def _changed(config: Settings, changes: Changes) -> Settings:
    """A copy of a recipe with changes; its batch is as large as the devices of its topology ask for."""
    changed = copy.deepcopy(config)
    recipes.apply_overrides(changed, changes)
    return changed


class _Cells:
    """The cells of a table, those of an earlier run of the same command among them.

    Args:
      workdir: of the run.
      count: of cells, for progress.
    """

    def __init__(self, workdir: pathlib.Path, count: int) -> None:
        self._file = workdir / _DONE
        self._known = {key: Outcome(**outcome) for key, outcome in (read_mapping(self._file) or {}).items()}
        self._lock = threading.Lock()
        self._count = count
        self._finished = 0

    def row(self, config: Settings) -> dict[str, Any]:
        """A cell's outcome, with advice where it does not fit."""
        outcome = self._outcome(config, {})
        row = {'topology': config.compile.topology, 'method': config.method.name, 'seq_len': config.data.seq_len}
        row |= dataclasses.asdict(outcome)
        if not outcome.fits:
            trial = advice.Trial(
                lambda changes: _least(_changed(config, changes)),
                lambda changes: self._outcome(config, changes),
                outcome,
            )
            found = advice.nearest(config, outcome, trial)
            row['advice'] = {'changes': found[0], **dataclasses.asdict(found[1])} if found else None
        with self._lock:
            self._finished += 1
            console.note(f'{self._finished}/{self._count} {_named(row)}: {_verdict(row)}')
        return row

    def _outcome(self, config: Settings, changes: Changes) -> Outcome:
        cell = _changed(config, changes)
        key = json.dumps(recipes.changed(cell), sort_keys=True)
        if key not in self._known:
            outcome = _compiled(cell)
            with self._lock:
                self._known[key] = outcome
                write_json(self._file, {key: dataclasses.asdict(known) for key, known in self._known.items()})
        return self._known[key]


def _opened(config: Settings) -> tuple[ahead.Step, list[Any] | None]:
    """The step of a cell, with as many rows as its devices ask for, and these devices (of `jax.Device`)."""
    devices, limit = ahead.target(config)
    if config.compile.rows_per_device:
        count = jax.device_count() if devices is None else len(devices)
        config = _changed(config, {'train.batch_size': config.compile.rows_per_device * count})
    mesh = mesh_choice.any_mesh(config, devices)
    ahead.check(config, mesh)
    return ahead.open_step(config, mesh, limit), devices


def _least(config: Settings) -> tuple[int, int]:
    """What a device holds at least, and what it has."""
    step, _ = _opened(config)
    return 0 if config.mesh.auto else step.least_bytes(), step.limit


def _compiled(config: Settings) -> Outcome:
    """Compiles a cell; not where the state alone is larger than a device."""
    step, devices = _opened(config)
    least, limit, count = step.least_bytes(), step.limit, step.mesh.size
    if least > limit and not config.mesh.auto:
        return Outcome(False, least, limit, count, False, least, mesh=mesh_choice.shown(step.mesh))
    if config.mesh.auto:
        step = ahead.open_step(step.config, mesh_choice.mesh_of(step.config, devices, limit), limit)
    try:
        *_, attempt = step.attempts()
    except UserError as error:
        return Outcome(False, least, limit, count, False, least, problem=str(error))
    shared = (attempt.peak_bytes, limit, count, True, least, attempt.accumulate, mesh_choice.shown(step.mesh))
    speed = step.speed(attempt) if attempt.fits else None
    if speed is None:
        return Outcome(attempt.fits, *shared)
    seconds = speed.estimate.seconds
    return Outcome(True, *shared, seconds, speed.tokens / seconds, speed.mfu)


def _named(row: Mapping[str, Any]) -> str:
    return f'{row["topology"] or "here"} {row["method"]} {row["seq_len"]:,}'


def _verdict(row: Mapping[str, Any]) -> str:
    if row['problem']:
        return row['problem']
    if row['fits']:
        return f'fits, {fits.memory(row)}'
    return f'does not fit, {fits.memory(row)}' + (f'; fits with {fits.advised(row)}' if row.get('advice') else '')


def _show(rows: list[dict[str, Any]]) -> None:
    titles = ('on', 'method', 'length', 'fits', 'GiB', 'of', 'tokens/s', 'MFU', 'update')
    table: list[tuple[str, ...]] = [titles]
    for row in rows:
        speed = row['tokens_per_second']
        table.append(
            (
                row['topology'] or 'here',
                row['method'],
                f'{row["seq_len"]}',
                'yes' if row['fits'] else 'no',
                f'{"" if row["compiled"] else "> "}{row["peak_bytes"] / 2**30:.1f}',
                f'{row["limit"] / 2**30:.1f}',
                f'{speed:,.0f}' if speed else '',
                f'{row["mfu"]:.0%}' if speed else '',
                short_time(row['seconds']) if speed else '',
            )
        )
    console.table(table)
    for row in rows:
        if not row['fits']:
            advised = f'fits with {fits.advised(row)}' if row['advice'] else 'nothing was found that fits'
            console.note(f'{_named(row)}: {advised}')
