"""The workdir of a run: its files, and whether a recipe may continue in it."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtune.common import console
from jaxtune.common.io import read_json, read_mapping, write_json
from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.recipe import ownership
from jaxtune.recipe.recipes import MAY_CHANGE, defaults, differing, flatten

INPUTS = 'inputs.json'
DATA = 'data.json'
SIGNATURE = 'checksums.json'  # in each checkpoint: checksums of its files, and the signature of its recipe

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Messages of libraries that keep no error number: TensorStore and NumPy.
_FULL_TEXT = re.compile('|'.join(map(os.strerror, sorted(_FULL))) + r'|\d+ requested and \d+ written')


def done(workdir: pathlib.Path) -> dict | None:
    """`result.json` of a run that finished, or None."""
    result = read_json(workdir / 'result.json')
    return result if isinstance(result, dict) and result.get('status') == 'done' else None


def result_fingerprint(workdir: pathlib.Path) -> str:
    """The SHA-256 of a stage's `result.json`, '' where there is none: it tells one result from another."""
    try:
        return hashlib.sha256((workdir / 'result.json').read_bytes()).hexdigest()
    except FileNotFoundError:
        return ''


def signature(recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Identifies the recipe of a checkpoint: `{'recipe': hash, 'steps': train.steps}`.

    Keys that may change and keys at their default are not in the hash, so that new keys do not alter it.

    Args:
      recipe: as `config.json` has it.
      inputs: as `inputs.json` has them.
    """
    usual = flatten(json.loads(defaults().to_json()))
    values = {path: value for path, value in flatten(recipe).items() if usual.get(path) != value}
    values = {path: value for path, value in values.items() if not path.startswith((*MAY_CHANGE, 'train.steps'))}
    text = json.dumps([values, dict(inputs)], sort_keys=True)
    return {'recipe': hashlib.sha256(text.encode()).hexdigest(), 'steps': recipe['train']['steps']}


def stored_signature(workdir: pathlib.Path) -> dict[str, Any]:
    """The signature of the recipe in a workdir, {} if there is none."""
    recipe = read_mapping(workdir / ownership.RECIPE)
    return {} if recipe is None else signature(recipe, read_mapping(workdir / INPUTS) or {})


def _others(workdir: pathlib.Path, own: Mapping[str, Any], known: bool) -> Iterator[str]:
    """Checkpoints of another recipe; without a `known` recipe, unsigned ones too."""
    for step in ownership.steps(workdir):
        name = f'checkpoints/{step}'
        try:
            saved = read_json(workdir / name / SIGNATURE)
        except UserError:  # damaged: restoring it reports so
            continue
        if not isinstance(saved, dict) or 'recipe' not in saved:
            if not known:
                yield f'{name} (of a recipe that is not there any more)'
        elif saved['recipe'] != own['recipe']:
            yield f'{name} (saved by another recipe)'
        elif own['steps'] != (was := saved.get('steps')) and not (was and was <= own['steps']):
            yield f'train.steps ({was} in {name}, {own["steps"]} here)'


def _differences(
    workdir: pathlib.Path,
    stored: Mapping[str, Any] | None,
    config: Settings,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, str],
    data: Mapping[str, str],
) -> list[str]:
    """Contents of a workdir with recipe `stored` that conflict with this one; `recipe` is `config` as JSON."""
    others = list(_others(workdir, signature(recipe, inputs), stored is not None))
    if stored is None:
        names = [name for name in ownership.results(workdir) if not name.startswith('checkpoints/')]
        return [f'{name} (of a recipe that is not there any more)' for name in names] + others
    before = read_mapping(workdir / INPUTS) or {}
    changed = [f'the result of stage {name}, made anew since' for name in before if before[name] != inputs.get(name)]
    differs = differing(stored, config)
    if (read := read_mapping(workdir / DATA)) and not any(name.startswith('data.') for name in differs):
        changed += _changes(read, data)
    return differs + changed + others


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files that changed between two runs of a recipe, except those of a key without files now."""
    there = {name.partition(': ')[0] for name in now}
    before = {name: value for name, value in before.items() if name.partition(': ')[0] in there}
    changes = []
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            what = 'is gone' if name not in now else 'is new' if name not in before else 'has changed'
            changes.append(f'{name}, which {what} since')
    return changes


def check_workdir(
    workdir: pathlib.Path,
    config: Settings,
    overwrite: bool,
    inputs: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
) -> list[str]:
    """Contents of a workdir that conflict with a recipe and must be removed first; arguments as for `open_workdir`.

    Raises:
      UserError: the workdir holds another recipe's run, and `overwrite` is not set.
    """
    return _checked(workdir, config, json.loads(config.to_json()), overwrite, inputs or {}, data or {})[1]


def _checked(
    workdir: pathlib.Path,
    config: Settings,
    recipe: Mapping[str, Any],
    overwrite: bool,
    inputs: Mapping[str, str],
    data: Mapping[str, str],
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """The recipe in a workdir, and what conflicts with this one; see `check_workdir`."""
    stored = None
    try:
        stored = read_mapping(workdir / ownership.RECIPE)
        names = _differences(workdir, stored, config, recipe, inputs, data)
    except UserError as error:  # a damaged file
        names = [str(error)]
    if names and not overwrite and ownership.begun(workdir):
        raise UserError(
            f'{workdir}: holds a run of another recipe; what differs: {"; ".join(names)}. Expected the same '
            'recipe, another --workdir, or --overwrite'
        )
    return stored, names


def open_workdir(
    workdir: pathlib.Path,
    config: Settings,
    overwrite: bool,
    inputs: Mapping[str, str] | None = None,
    data: Mapping[str, str] | None = None,
) -> dict | None:
    """Opens a workdir for a recipe and writes `config.json`; only in process 0 of a pod, which holds the lock.

    A workdir of another recipe without results is reused.

    Args:
      workdir: an existing folder.
      config: the full recipe.
      overwrite: empties a workdir of another recipe or other inputs instead of raising.
      inputs: earlier stage whose output is read -> the fingerprint of its result (`result_fingerprint`).
      data: fingerprints of the files that are read (`jaxtune.data.inputs.fingerprints`).

    Returns:
      `result.json` of the finished run with this very recipe, or None if there is work to do.

    Raises:
      UserError: the workdir holds another recipe's run, or cannot be written.
    """
    inputs, recipe = dict(inputs or {}), json.loads(config.to_json())
    try:
        ownership.sweep(workdir)
        stored, differences = _checked(workdir, config, recipe, overwrite, inputs, data or {})
        if differences:
            ownership.empty(workdir, keep=() if overwrite else (ownership.CACHE,))
            stored = None
        result = done(workdir) if stored and stored['train'] == recipe['train'] else None
        if result is None:  # that of a shorter run must not pass for this one's
            (workdir / 'result.json').unlink(missing_ok=True)
        if inputs:
            write_json(workdir / INPUTS, inputs)
        if data and dict(data) != read_mapping(workdir / DATA):
            write_json(workdir / DATA, dict(data))
        write_json(workdir / ownership.RECIPE, recipe)
    except OSError as error:
        raise UserError(f'--workdir={workdir}: cannot write there: {error.strerror}') from None
    return result


def open_root(workdir: pathlib.Path, overwrite: bool) -> None:
    """Opens the folder of a recipe of stages.

    Raises:
      UserError: it holds a run of a recipe without stages.
    """
    if not (workdir / ownership.RECIPE).exists():
        return
    if not overwrite:
        raise UserError(
            f'{workdir}: holds a run of a recipe without stages; expected the same recipe, another --workdir, or '
            '--overwrite'
        )
    ownership.empty(workdir)


def _inside(name: Any, folder: pathlib.Path) -> bool:
    return isinstance(name, str | os.PathLike) and folder in pathlib.Path(name).parents


@contextlib.contextmanager
def working(workdir: pathlib.Path) -> Iterator[None]:
    """Around a run in a workdir: explains failures that concern the workdir, and cleans up after them.

    Raises:
      UserError: the disk is full, or the workdir was removed. Other exceptions of the run pass through.
    """
    try:
        yield
    except Exception as error:
        if console.is_primary():  # others may see another disk, and must not clean up while it writes
            _check_there(workdir)
            _tidy(workdir, refused=isinstance(error, UserError))
        if isinstance(error, IsADirectoryError | NotADirectoryError) and _inside(error.filename, workdir):
            raise UserError(f'{error.filename}: expected a file of the run; {str(error.strerror).lower()}') from None
        if room := no_room(error):
            raise UserError(f'--workdir={workdir}: {room}; expected free space; the same command continues') from None
        raise
    if console.is_primary():
        _check_there(workdir)


def _check_there(workdir: pathlib.Path) -> None:
    if not (workdir / ownership.MARK).exists():
        raise UserError(f'--workdir={workdir}: was removed while the run was going') from None


def _tidy(workdir: pathlib.Path, refused: bool) -> None:
    """After a failed run: removes half-written files, and the recipe of a run without results."""
    with contextlib.suppress(OSError):
        ownership.sweep(workdir)
        if refused and not ownership.results(workdir):
            (workdir / ownership.RECIPE).unlink(missing_ok=True)


def no_room(error: BaseException | None) -> str:
    """The message of an error that means a full disk, from any library; '' for other errors."""
    seen: list[BaseException | None] = [error]
    for exception in seen:
        if exception is None:
            continue
        if isinstance(exception, OSError) and exception.errno in _FULL:
            return f'{os.strerror(exception.errno)}' + (f': {exception.filename}' if exception.filename else '')
        if not isinstance(exception, UserError) and _FULL_TEXT.search(str(exception)):
            return os.strerror(errno.ENOSPC)
        causes = [exception.__cause__, exception.__context__, *getattr(exception, 'exceptions', ())]
        seen += [cause for cause in causes if cause not in seen]
    return ''


def make_result(task: str, step: int, metrics: Mapping[str, Any], status: str = 'done') -> dict:
    """The content of `result.json`; NaN and infinities, which JSON lacks, become null."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in metrics.items()}
    return {'task': task, 'status': status, 'step': step, 'metrics': finite}


def write_result(workdir: pathlib.Path, task: str, step: int, metrics: Mapping[str, Any], status: str = 'done') -> dict:
    """Writes `result.json`, the last file of a run; returns its content."""
    result = make_result(task, step, metrics, status)
    write_json(workdir / 'result.json', result)
    return result
