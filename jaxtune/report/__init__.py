"""`report.html`: one page about a run that stands alone, without network, and works without scripts."""

import dataclasses
import html
import importlib.resources
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtune.common import console
from jaxtune.common.formatting import duration
from jaxtune.common.io import read_json, write_text
from jaxtune.config import TRAINING
from jaxtune.recipe.workdir import make_result, write_result
from jaxtune.report import sections
from jaxtune.report.preparation import preparation
from jaxtune.report.source import Source, read

__all__ = ['finish', 'write_report']

NAME = 'report.html'


def finish(workdir: pathlib.Path, task: str, step: int, metrics: Mapping[str, Any]) -> dict:
    """Writes `report.html`, then `result.json`, the last file of a run; returns what the latter holds."""
    write_report(workdir, make_result(task, step, metrics))
    return write_result(workdir, task, step, metrics)


def write_report(workdir: pathlib.Path, result: Mapping[str, Any] | None = None) -> None:
    """Writes `report.html` from what is in a workdir; of a workdir of stages, a section a stage in their order.

    Files that are not there leave their part of the page out. Only process 0 writes.

    Args:
      workdir: of the run.
      result: what `result.json` will hold; None where it holds it already, or never will.
    """
    if console.is_primary():
        write_text(workdir / NAME, render(workdir, result))


def render(workdir: pathlib.Path, result: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    result = read_json(workdir / 'result.json') or {} if result is None else result
    name = workdir.absolute().name
    stages = [read(workdir / stage, stage) for stage in result.get('stages') or ()]
    if not stages:
        source = dataclasses.replace(read(workdir), result=result)
        return _page(name, _eyebrow(source), _single(source))
    return _page(name, _eyebrow_of(stages, result), _staged(stages))


def _single(source: Source) -> str:
    head = f'<p class="lead">{sections.lead(source)}</p>{sections.tiles(source)}'
    return f'{head}<section>{_body(source)}{_ending(source)}</section>'


def _staged(stages: list[Source]) -> str:
    main = _main(stages)
    nav = ''.join(
        f'<a href="#{html.escape(stage.name)}">{html.escape(stage.name)} <small>{_time(stage)}</small></a>'
        for stage in stages
    )
    times = [stage.run['seconds'] for stage in stages if 'seconds' in stage.run]
    total = sum(times) if len(times) == len(stages) else None
    head = f'<p class="lead">{sections.lead(main)}</p>{sections.tiles(main, total)}<nav>{nav}</nav>'
    body = ''.join(_stage(stage, f'stage {i} of {len(stages)}', stage is main) for i, stage in enumerate(stages, 1))
    ending = f'<section><h2>The machine</h2>{sections.machine(main)}{sections.reproduce(main)}</section>'
    return head + body + ending


def _stage(stage: Source, which: str, is_main: bool) -> str:
    # What the page's head says already is not said again.
    summary = '' if is_main else f'<p class="lead">{sections.lead(stage)}</p>{sections.tiles(stage)}'
    return (
        f'<section id="{html.escape(stage.name)}"><p class="eyebrow">{which} · <b>{html.escape(stage.task)}</b></p>'
        f'<h2>{html.escape(stage.name)}</h2>{summary}{_body(stage)}{sections.recipe(stage)}</section>'
    )


def _main(stages: list[Source]) -> Source:
    """The stage that the page's head is about: the last that trained, else the last that has a loss, else the last."""
    trained = [stage for stage in stages if stage.task in TRAINING]
    scored = [stage for stage in stages if stage.metric('eval/loss') is not None]
    return (trained or scored or stages)[-1]


def _time(stage: Source) -> str:
    return duration(stage.run['seconds']) if 'seconds' in stage.run else ''


def _body(source: Source) -> str:
    parts = (
        preparation,
        sections.charts,
        sections.example,
        sections.samples,
        sections.time_spent,
        sections.results,
    )
    return ''.join(part(source) for part in parts)


def _ending(source: Source) -> str:
    return sections.recipe(source) + sections.machine(source) + sections.reproduce(source)


def _eyebrow(source: Source) -> str:
    return _head(source.task, source.result.get('status', 'not finished'), source.run.get('ended', ''))


def _eyebrow_of(stages: list[Source], result: Mapping[str, Any]) -> str:
    ended = max((stage.run.get('ended', '') for stage in stages), default='')
    return _head(f'{len(stages)} stages', result.get('status', 'not finished'), ended)


def _head(what: str, status: str, ended: str) -> str:
    day = f' · {html.escape(ended[:10])}' if ended else ''
    return f'jaxtune · <b>{html.escape(what)}</b>{day} <span class="status">{html.escape(status)}</span>'


def _page(name: str, eyebrow: str, body: str) -> str:
    files = importlib.resources.files(__name__)
    style = files.joinpath('style.css').read_text(encoding='utf-8')
    script = files.joinpath('hover.js').read_text(encoding='utf-8')
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8" />'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" /><link rel="icon" href="data:," />'
        f'<title>{html.escape(name)} · jaxtune</title><style>\n{style}</style></head>\n'
        f'<body><main><header><p class="eyebrow">{eyebrow}</p><h1>{html.escape(name)}</h1></header>\n'
        f'{body}<footer>Written by jaxtune. Everything on this page comes from the files beside it.</footer></main>\n'
        f'<script>\n{script}</script></body></html>\n'
    )
