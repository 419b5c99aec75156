"""Running the tasks of a recipe in order, each in its own folder, and finding one stage's output from another."""

import contextlib
import copy
import functools
import importlib
import pathlib
from collections.abc import Mapping
from types import ModuleType

from jaxtune import report
from jaxtune.common import console, io
from jaxtune.common.settings import Settings
from jaxtune.config import is_rewarded
from jaxtune.parallel import hosts
from jaxtune.recipe import ownership, recipes, workdir
from jaxtune.recipe.flags import Command


def module_of(task: str) -> ModuleType:
    """The module of a task, with `run(config, workdir, command)`, which returns `result.json`'s content."""
    return importlib.import_module(f'jaxtune.tasks.{"rewarded" if is_rewarded(task) else task}')


def run(command: Command) -> None:
    """Runs every stage that has not finished yet; or with `command.check`, checks them all."""
    if command.check:
        from jaxtune.tasks import preflight  # slow to import, and only --check needs it

        console.note(preflight.check(command))
        return
    with contextlib.ExitStack() as held:
        _run_stages(command, held)


def _run_stages(command: Command, held: contextlib.ExitStack) -> None:
    """Runs the stages; `held` keeps their folders, and the one that holds them, locked in process 0."""
    staged = '' not in command.configs
    results = dict(command.finished)
    if staged:
        hosts.from_primary(functools.partial(_open_root, command, held))
    for name, config in command.configs.items():
        folder = command.workdir / name if name else command.workdir
        if staged:
            console.note(f'stage {name} ({config.task}) in {folder}')
        finished = hosts.from_primary(functools.partial(_open, command, folder, config, held))
        if finished is None:
            with workdir.working(folder):
                finished = module_of(config.task).run(point_to_stages(config, command.workdir), folder, command)
        else:
            console.note(f'already done: {folder}/result.json (another --workdir starts anew)')
        results[name] = finished
    if staged and console.is_primary():
        _finish_root(command.workdir, results)


def _open_root(command: Command, held: contextlib.ExitStack) -> None:
    held.enter_context(ownership.locked(command.workdir))
    workdir.open_root(command.workdir, command.overwrite)


def _open(command: Command, folder: pathlib.Path, config: Settings, held: contextlib.ExitStack) -> dict | None:
    """Locks and opens a task's folder; returns its result where it is done."""
    from jaxtune.data.inputs import KEYS, fingerprints  # slow to import

    held.enter_context(ownership.locked(folder))
    inputs = {stage: workdir.result_fingerprint(command.workdir / stage) for stage in recipes.references(config)}
    data = {key: recipes.config_get(config, key) for key in KEYS}
    result = workdir.open_workdir(folder, config, command.overwrite, inputs, fingerprints(data))
    if result is not None and config.task != 'export' and not (folder / report.NAME).is_file():
        report.write_report(folder, result)
    return result


def _finish_root(folder: pathlib.Path, results: Mapping[str, dict]) -> None:
    """Writes the report and the result of all stages."""
    metrics = {f'{name}/{key}': value for name, result in results.items() for key, value in result['metrics'].items()}
    last = list(results)[-1]
    result = {'task': 'stages', 'status': 'done', 'step': results[last]['step'], 'metrics': metrics}
    result['stages'] = list(results)
    report.write_report(folder, result)
    io.write_json(folder / 'result.json', result)


def point_to_stages(config: Settings, root: pathlib.Path) -> Settings:
    """A copy in which `@NAME` is the folder of the stage NAME below `root`."""
    config = copy.deepcopy(config)
    for path, value in recipes.references_by_key(config).items():
        parent, last = path.rsplit('.', 1)
        recipes.config_get(config, parent)[last] = str(root / value[1:])
    return config
