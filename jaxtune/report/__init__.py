"""`report.html`: a self-contained page about a run, which needs no network and works without scripts."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtune.common import console
from jaxtune.common.formatting import duration
from jaxtune.common.io import read_mapping, write_text
from jaxtune.recipe.workdir import make_result, write_result
from jaxtune.report import by_position, costs, fits, mixture, samples, sections
from jaxtune.report.preparation import preparation
from jaxtune.report.source import Source, main_stage, read
from jaxtune.report.templates import fill_in

__all__ = ['finish', 'write_report']

NAME = 'report.html'


def finish(workdir: pathlib.Path, task: str, step: int, metrics: Mapping[str, Any]) -> dict:
    """Writes `report.html`, then `result.json`, the last file of a run; returns the content of the latter."""
    write_report(workdir, make_result(task, step, metrics))
    return write_result(workdir, task, step, metrics)


def write_report(workdir: pathlib.Path, result: Mapping[str, Any] | None = None) -> None:
    """Writes `report.html` from the files of a workdir; for stages, with one section per stage.

    Missing files leave out their part of the page. Only process 0 writes.

    Args:
      workdir: of the run.
      result: the content of `result.json` if it is not written yet.
    """
    if console.is_primary():
        write_text(workdir / NAME, render(workdir, result))


def render(workdir: pathlib.Path, result: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    return fill_in('page.html.j2', _contents(workdir, result))


def _contents(workdir: pathlib.Path, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables of `page.html.j2`."""
    result = (read_mapping(workdir / 'result.json') or {}) if given is None else given
    contents = {'name': workdir.absolute().name, 'status': result.get('status', 'not finished')}
    stages = [read(workdir / stage, stage) for stage in result.get('stages') or ()]
    if not stages:
        source = dataclasses.replace(read(workdir), result=result)
        return contents | {
            'what': source.task,
            'day': source.run.get('ended', '')[:10],
            'main': _run(source),
            'tiles': sections.tiles(source),
            'stages': [],
        }
    main = main_stage(stages)
    times = [stage.run['seconds'] for stage in stages if 'seconds' in stage.run]
    return contents | {
        'what': f'{len(stages)} stages',
        'day': max((stage.run.get('ended', '') for stage in stages), default='')[:10],
        'main': _run(main),
        'tiles': sections.tiles(main, sum(times) if len(times) == len(stages) else None),
        # The stage in the page's head is not summarised again.
        'stages': [_run(stage) | {'in_head': stage is main} for stage in stages],
    }


def _run(source: Source) -> dict[str, Any]:
    """The variables of `run.html.j2` for a run."""
    return {
        'name': source.name,
        'task': source.task,
        'time': duration(source.run['seconds']) if 'seconds' in source.run else '',
        'by': 'step' if source.rewarded else 'update',
        'lead': sections.lead(source),
        'tiles': sections.tiles(source),
        'preparation': preparation(source),
        'charts': sections.charts(source),
        'by_position': by_position.figure(source),
        'mixture': mixture.table(source),
        'costs': costs.of(source),
        'fits': fits.table(source),
        'example': source.run.get('example') or (),
        'samples': samples.samples(source),
        'phases': sections.time_spent(source),
        'results': sections.results(source),
        'results_open': source.task in ('evaluate', 'compile', 'export'),
        'recipe': sections.recipe(source),
        'machine': sections.machine(source),
        'command': sections.reproduce(source),
    }
