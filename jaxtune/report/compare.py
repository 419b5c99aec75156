"""A page that lays runs side by side: their curves in one chart, what differs in their recipes, the same prompts."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.common.formatting import duration, size
from jaxtune.common.io import read_mapping
from jaxtune.errors import UserError
from jaxtune.metrics import names
from jaxtune.recipe.ownership import is_workdir
from jaxtune.report import samples, sections
from jaxtune.report.charts import Figure, Series, smooth
from jaxtune.report.source import Source, main_stage, read
from jaxtune.report.state import state_of
from jaxtune.report.templates import fill_in

MOST = 8  # runs, of which each has a colour of its own
_PROMPTS, _MOST_CHARS = 8, 1200
_SMOOTHED = 20  # points of a curve from which on it is smoothed
# Keys that change nothing of what is learnt.
_BESIDE = ('log.', 'checkpoint.', 'data.workers', 'data.engine')


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the runs.

    Attributes:
      name: what it is called here, unlike the others.
      color: of the stylesheet.
      source: its files; of a recipe of stages those of the one that stands for it.
      state: how far it has come.
    """

    name: str
    color: str
    source: Source
    state: str


def open_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """The runs of workdirs.

    Raises:
      UserError: fewer than two or more than eight, one twice, or one that is no workdir with a run.
    """
    if not 2 <= len(workdirs) <= MOST:
        raise UserError(f'jaxtune compare: expected 2 to {MOST} workdirs, not {len(workdirs)}')
    named = _names(workdirs)
    return [
        Run(name, f'run-{number}', open_source(folder), str(state_of(folder)))
        for number, (name, folder) in enumerate(zip(named, workdirs, strict=True))
    ]


def open_source(workdir: pathlib.Path) -> Source:
    """The files of a run, or of the stage that stands for a recipe of stages.

    Raises:
      UserError: there is no run.
    """
    result = read_mapping(workdir / 'result.json') or {}
    stages = [read(workdir / stage, stage) for stage in result.get('stages') or ()]
    if stages:
        return main_stage(stages)
    source = read(workdir)
    if source.config:
        return source
    inside = sorted(entry.name for entry in workdir.iterdir() if is_workdir(entry)) if workdir.is_dir() else []
    hint = f'; its stages are {", ".join(inside)}' if inside else ''
    raise UserError(f'{workdir}: expected the workdir of a run, with config.json{hint}')


def _names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    paths = [folder.absolute().parts for folder in workdirs]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder in workdirs if paths.count(folder.absolute().parts) > 1)
        raise UserError(f'jaxtune compare: {twice} is there twice; expected different workdirs')
    length = next(n for n in range(1, 100) if len({parts[-n:] for parts in paths}) == len(paths))
    return ['/'.join(parts[-length:]) for parts in paths]


def page(runs: Sequence[Run]) -> str:
    """The page as text."""
    differences = differing_keys(runs)
    by_tokens = len({run.source.run.get('tokens_per_step') for run in runs}) > 1
    by_tokens = by_tokens and all(run.source.run.get('tokens_per_step') for run in runs)
    keys = [key for key, _ in differences]
    shown = f'{", ".join(keys[:4])}{f" and {len(keys) - 4} more" if len(keys) > 4 else ""}'
    values = {
        'runs': runs,
        'lead': f'What differs in their recipes: {shown}.' if keys else 'Their recipes are the same.',
        'columns': table(runs),
        'by': 'tokens' if by_tokens else 'updates',
        'charts': charts(runs, by_tokens),
        'differences': differences,
        'prompts': prompts(runs),
    }
    return fill_in('compare.html.j2', values)


def differing_keys(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """`(key, its value in each run)` of the keys whose values differ and that change what is learnt."""
    recipes = [{key: value for key, value, _ in run.source.recipe()} for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [repr(recipe[key]) if key in recipe else '' for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and not key.startswith(_BESIDE)]


def _number(value: float) -> str:
    return sections.number(float(value))


# Columns of the table: title, value of a run, how it is shown, and whether more is better, less (-1), or neither (0).
COLUMNS: tuple[tuple[str, Callable[[Source], float | None], Callable[[float], str], int], ...] = (
    ('held-out loss', lambda run: _best(run, 'eval/loss', min), _number, -1),
    ('held-out reward', lambda run: _best(run, 'eval/reward', max), _number, 1),
    ('accuracy', lambda run: _best(run, 'eval/accuracy', max), lambda value: f'{100 * value:.1f} %', 1),
    ('training loss', lambda run: run.metric('train/loss'), _number, 0),
    ('tokens a second', lambda run: run.tokens_per_second, _number, 1),
    ('peak memory', lambda run: run.metric('memory/peak_bytes'), size, -1),
    ('trained', lambda run: (run.run.get('model') or {}).get('trainable'), lambda count: f'{count:,.0f}', 0),
    ('time', lambda run: run.run.get('seconds'), duration, 0),
)


def table(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """`(title, (value, whether it is the best) of each run)` of what at least one run has."""
    rows = []
    for title, value, show, sign in COLUMNS:
        values = [value(run.source) for run in runs]
        known = [x for x in values if x is not None]
        if not known:
            continue
        best = max(known, key=lambda x: sign * x) if sign and len(set(known)) > 1 else None
        rows.append((title, [('', False) if x is None else (show(x), x == best) for x in values]))
    return rows


def _best(source: Source, name: str, choose: Callable[..., float]) -> float | None:
    values = [value for _, value in source.curves.get(name, ())]
    return choose(values) if values else source.metric(name)


def charts(runs: Sequence[Run], by_tokens: bool) -> list[Figure]:
    """The curves that runs have, each metric's in one chart: held-out ones first, the first of all large.

    Args:
      runs: the runs.
      by_tokens: over tokens seen instead of updates.
    """
    curves: dict[tuple[bool, str], list[tuple[Run, str]]] = {}
    for run in runs:
        for metric, points in run.source.curves.items():
            if len(points) > 1 and not names.source_of(metric) and not names.positions_of(metric):
                place = (metric.startswith('eval/'), names.last_part(metric))
                curves.setdefault(place, []).append((run, metric))
    figures = []
    for held_out, last in sorted(curves, key=_order):
        if last in sections.NO_CHART:
            continue
        series = []
        for run, metric in curves[held_out, last]:
            scale = run.source.run['tokens_per_step'] if by_tokens else 1
            points = [(step * scale, value) for step, value in run.source.curves[metric]]
            many = len(points) > _SMOOTHED and not held_out
            series.append(
                Series(run.name, smooth(points) if many else points, run.color, 'dots' if held_out else 'line')
            )
        title = names.title(last, runs[0].source.titles) + (', held out' if held_out else '')
        figure = sections.metric_chart(title, series, last, large=not figures)
        figures += [figure] if figure else []
    return figures


def _order(place: tuple[bool, str]) -> tuple:
    """Loss and reward first, held out before training; then as in a run's own page."""
    held_out, last = place
    main = last in ('loss', 'reward')
    first = sections.FIRST.index(last) if last in sections.FIRST else len(sections.FIRST)
    return not main, not held_out, first, last


def prompts(runs: Sequence[Run]) -> list[tuple[str, list[tuple[Run, str, str]]]]:
    """`(prompt, (run, its last answer, its score) of each run)` for prompts that at least two runs answered."""
    answers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        newest = max((row.get('step') or 0 for row in run.source.samples), default=0)
        for row in run.source.samples:
            if (row.get('step') or 0) == newest:
                answers.setdefault(samples.plain(row.get('prompt')), {}).setdefault(run.name, row)
    shared = [(prompt, given) for prompt, given in answers.items() if len(given) > 1]
    return [
        (
            prompt[-_MOST_CHARS:],
            [(run, *_answer(given[run.name])) for run in runs if run.name in given],
        )
        for prompt, given in shared[:_PROMPTS]
    ]


def _answer(row: Mapping[str, Any]) -> tuple[str, str]:
    score = row.get('score')
    shown = f'score {sections.number(score)}' if isinstance(score, int | float) and score == score else ''
    return samples.plain(row.get('completion'))[:_MOST_CHARS], shown
