"""A workdir: what a run leaves there, and whether the same command may go on in it."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxtune.errors import UserError
from jaxtune.recipes import differing

INPUTS = 'inputs.json'
OURS = ('checkpoints', 'export', 'adapter', 'tensorboard', 'cache', 'train', 'eval', 'tokenizer', 'work')


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file, or None where there is none.

    Raises:
      UserError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f'{path}: expected JSON: {error}') from None


def done(workdir: pathlib.Path) -> dict | None:
    """`result.json` of a run that finished, or None."""
    result = read_json(workdir / 'result.json')
    return result if result and result.get('status') == 'done' else None


def mark(workdir: pathlib.Path) -> str:
    """What tells one result of a stage from another: a hash of its `result.json`."""
    try:
        return hashlib.sha256((workdir / 'result.json').read_bytes()).hexdigest()
    except FileNotFoundError:
        return ''


def claim(
    workdir: pathlib.Path, config: ConfigDict, overwrite: bool, inputs: Mapping[str, str] | None = None
) -> dict | None:
    """Opens a workdir for a recipe and leaves `config.json` there; in process 0 of a pod alone.

    Args:
      workdir: made if it is not there.
      config: the full recipe.
      overwrite: a workdir of another recipe, or of other inputs, is emptied instead of refused.
      inputs: earlier stage whose output is read -> a mark of its result (`mark`).

    Returns:
      `result.json` of the finished run with this very recipe, or None if there is work to do.

    Raises:
      UserError: the workdir holds another recipe's run, or something else's files.
    """
    inputs = dict(inputs or {})
    stored = read_json(workdir / 'config.json')
    if stored is not None:
        names = differing(stored, config)
        before = read_json(workdir / INPUTS) or {}
        names += [f'the result of stage {name}, made anew since' for name in before if before[name] != inputs.get(name)]
        if names and not overwrite:
            raise UserError(
                f'{workdir}: holds a run of another recipe; what differs: {"; ".join(names)}. Expected the same '
                'recipe, another --workdir, or --overwrite'
            )
        if names:
            for entry in workdir.iterdir():
                if entry.is_dir() and not entry.is_symlink() and entry.name in OURS:
                    shutil.rmtree(entry)
                elif entry.is_file():
                    entry.unlink()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir}: expected a folder')
    result = done(workdir) if stored is not None else None
    try:
        write_json(workdir / 'config.json', json.loads(config.to_json()))
        if inputs:
            write_json(workdir / INPUTS, inputs)
    except OSError as error:
        raise UserError(f'--workdir={workdir}: cannot write there: {error.strerror}') from None
    same_length = stored is not None and stored['train'] == json.loads(config.to_json())['train']
    return result if same_length else None


def write_result(workdir: pathlib.Path, task: str, step: int, metrics: dict, status: str = 'done') -> dict:
    """Writes `result.json`, the last file of a run."""
    result = {'task': task, 'status': status, 'step': step, 'metrics': metrics}
    write_json(workdir / 'result.json', result)
    return result
