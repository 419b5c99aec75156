"""The runs below a folder: what each is, how far it has come, its best value and its command."""

import dataclasses
import datetime
import os
import pathlib
from collections.abc import Iterator

from jaxtune.common.formatting import duration
from jaxtune.common.io import read_mapping
from jaxtune.errors import UserError
from jaxtune.recipe.ownership import MARK, is_workdir
from jaxtune.report import compare
from jaxtune.report.source import Source
from jaxtune.report.state import state_of
from jaxtune.report.templates import fill_in

_DEEPEST = 3  # folders between that of the runs and a run


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run in a list.

    Attributes:
      path: of its workdir, below the folder of the list.
      what: its task, and method or algorithm.
      state: in words.
      best: its best value in words; '' where it has none.
      time: that it took, in words; '' where it is not known.
      changed: when a file of it last changed, in seconds since 1970.
      command: that continues or repeats it; '' where it is not known.
      page: whether it has a report.
    """

    path: str
    what: str
    state: str
    best: str
    time: str
    changed: float
    command: str
    page: bool

    @property
    def day(self) -> str:
        """When a file of it last changed, local time."""
        return datetime.datetime.fromtimestamp(self.changed).astimezone().strftime('%Y-%m-%d %H:%M')


def entries(folder: pathlib.Path) -> list[Entry]:
    """The runs below a folder, those that changed last first; stages count as one run."""
    found = [_entry(workdir, folder) for workdir in _workdirs(folder, _DEEPEST)]
    return sorted(found, key=lambda entry: -entry.changed)


def page(folder: pathlib.Path, runs: list[Entry]) -> str:
    """The list as a page that lies in the folder, with links to the runs' own pages."""
    return fill_in('runs.html.j2', {'name': folder.absolute().name, 'runs': runs})


def _workdirs(folder: pathlib.Path, deepest: int) -> Iterator[pathlib.Path]:
    try:
        inside = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    except OSError:
        return
    for entry in inside:
        if is_workdir(entry):
            yield entry
        elif deepest > 1:
            yield from _workdirs(entry, deepest - 1)


def _entry(workdir: pathlib.Path, folder: pathlib.Path) -> Entry:
    result = read_mapping(workdir / 'result.json') or {}
    stages = result.get('stages') or [entry.name for entry in sorted(workdir.iterdir()) if (entry / MARK).is_file()]
    stages = [workdir / stage for stage in stages if (workdir / stage).is_dir()]
    try:
        source = compare.open_source(workdir if result or not stages else stages[-1])
    except UserError:
        source = Source(workdir.name, {}, result, {}, {}, ())
    states = [(stage.name, state_of(stage)) for stage in stages]
    going = next(((name, state) for name, state in states if state.word != 'done'), None)
    state = f'{going[0]} {going[1]}' if going else 'done' if stages else str(state_of(workdir))
    files = [workdir, *stages, *(folder / name for folder in (workdir, *stages) for name in ('metrics.jsonl', MARK))]
    changed = max((os.stat(path).st_mtime for path in files if path.exists()), default=0.0)
    what = ', '.join(
        part for part in (f'{len(stages)} stage{"s" * (len(stages) > 1)}' if stages else '', _what(source)) if part
    )
    seconds = sum((read_mapping(stage / 'run.json') or {}).get('seconds', 0.0) for stage in stages or [workdir])
    return Entry(
        path=str(workdir.relative_to(folder)),
        what=what,
        state=state,
        best=_best(source),
        time=duration(seconds) if seconds else '',
        changed=changed,
        command=str(source.run.get('command') or ''),
        page=(workdir / 'report.html').is_file(),
    )


def _what(source: Source) -> str:
    if not source.config:
        return ''
    if source.rewarded:
        return source.algorithm
    method = source.key('method.name') if source.task == 'train' else ''
    return ' '.join(part for part in (source.key('objective') if method else source.task, method) if part)


def _best(source: Source) -> str:
    """The best value of a run: of held-out data, else the last of training."""
    known = ((title, value(source), show) for title, value, show, _ in compare.COLUMNS[:4])
    return next((f'{title} {show(x)}' for title, x, show in known if x is not None), '')
