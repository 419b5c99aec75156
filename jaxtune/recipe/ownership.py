"""Which folders are workdirs, and which files in them are jaxtune's. Files of the user are never touched."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Collection, Iterator

from jaxtune.errors import UserError

MARK = '.jaxtune'  # marks a folder as a workdir, and is locked while a process works in it
CACHE = 'cache'
FOLDERS = (
    'checkpoints', 'export', 'adapter', 'base', 'tensorboard', CACHE, 'train', 'eval', 'tokenizer', 'work', 'wandb',
)  # fmt: skip
FILES = (
    'data.json', 'inputs.json', 'metrics.jsonl', 'result.json', 'report.html', 'run.json', 'samples.jsonl',
    '.samples.partial.jsonl', 'compile.json', 'cells.json', 'mesh.json', 'stats.json', 'manifest.json',
    'set_aside.jsonl', 'train.jsonl', 'eval.jsonl', 'wandb_run',
)  # fmt: skip
RECIPE = 'config.json'

# Results that another recipe would overwrite or mistake for its own.
_RESULTS = ('result.json', 'export', 'adapter', '.samples.partial.jsonl', 'tokenizer', 'train', 'eval', 'train.jsonl')
# Signs of a folder that holds a model, an adapter or a project.
_FOREIGN = re.compile(r'.*\.(safetensors|gguf)|pytorch_model.*|(tokenizer|generation|adapter).*\.json|\.git')
# Temporary names of the above, left by a killed process: `.export.partial`.
_HALF = re.compile(
    rf'\.({"|".join(FOLDERS)})\.(partial|new|old|\d+)|\.({"|".join(FILES)}|{RECIPE})\.([a-z0-9_]{{8}}|\d+)|\.eval\.jsonl'
)


def _stored_recipe(workdir: pathlib.Path) -> bool:
    """Whether `config.json` is a full recipe, as versions without the mark left it."""
    try:
        stored = json.loads((workdir / RECIPE).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and {'task', 'train', 'optimizer', 'checkpoint', 'data'} <= stored.keys()


def is_workdir(folder: pathlib.Path) -> bool:
    """Whether jaxtune made a folder its workdir."""
    return (folder / MARK).is_file() or _stored_recipe(folder)


def foreign(folder: pathlib.Path) -> str:
    """The name of an entry that shows that a folder is not jaxtune's; '' if it may become a workdir."""
    if not folder.is_dir() or is_workdir(folder):
        return ''
    stages = {entry.name for entry in folder.iterdir() if entry.is_dir() and is_workdir(entry)}
    names = sorted(entry.name for entry in folder.iterdir() if entry.name not in stages)
    # The folder of a recipe of stages, of a version without the mark.
    known = {'result.json', 'report.html'} if stages else set()
    taken = {*FOLDERS, *FILES, RECIPE} - known
    return next((name for name in names if name in taken or _FOREIGN.fullmatch(name)), '')


def check_owned(workdir: pathlib.Path) -> None:
    """Rejects a path that is no folder, and a folder that is not jaxtune's.

    Raises:
      UserError: it is one of these.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir}: expected a folder that can be written')
    if name := foreign(workdir):
        raise UserError(
            f'--workdir={workdir}: holds {name}, and jaxtune did not make this folder; expected an empty one, a new '
            'one or the workdir of a run'
        )


def results(workdir: pathlib.Path) -> list[str]:
    """Names of the results of a run so far that would be costly to lose."""
    names = [name for name in _RESULTS if (workdir / name).exists()]
    return names + [f'checkpoints/{step}' for step in steps(workdir)]


def begun(workdir: pathlib.Path) -> bool:
    """Whether a workdir holds work that another recipe would destroy."""
    return bool(results(workdir)) or any(workdir.glob('work/logs/*/completions/*'))


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a workdir."""
    try:
        return sorted(int(entry.name) for entry in (workdir / 'checkpoints').iterdir() if entry.name.isdecimal())
    except OSError:
        return []


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def empty(workdir: pathlib.Path, keep: Collection[str] = ()) -> None:
    """Removes jaxtune's files: checkpoints first, the recipe last, so that no other recipe takes them for its own.

    Links are removed, their targets are not.

    Args:
      workdir: the folder.
      keep: names to keep.
    """
    for name in (*FOLDERS, *FILES, RECIPE):
        if name not in keep:
            _remove(workdir / name)
    sweep(workdir)


def sweep(workdir: pathlib.Path) -> None:
    """Removes half-written files of killed processes. Nothing may be writing there."""
    half = [entry for entry in workdir.iterdir() if _HALF.fullmatch(entry.name)]
    for entry in [*half, *workdir.glob('checkpoints/*.orbax-checkpoint-tmp*')]:
        _remove(entry)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Locks a workdir, which is created if missing, for this process alone.

    Raises:
      UserError: another process has it locked, or the folder is not jaxtune's and is left unchanged.
    """
    check_owned(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / MARK, 'a+', encoding='utf-8')  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise UserError(f'--workdir={workdir}: expected a folder that can be written: {error}') from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = ' '.join(file.read(200).split())
            raise UserError(
                f'--workdir={workdir}: in use by another run ({holder}); expected its end, or another --workdir'
            ) from None
        except OSError:  # a file system without locks
            pass
        before = os.fstat(file.fileno())
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()
        os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))  # a run that is done changes nothing
        yield
