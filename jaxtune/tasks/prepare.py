"""`task=prepare`: documents become a training set: a tokenizer and two folders of tokens, one of them held out."""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

from jaxtune import report
from jaxtune.common import console
from jaxtune.common.formatting import size
from jaxtune.common.io import read_json, write_json
from jaxtune.common.settings import Settings
from jaxtune.data.cache import once
from jaxtune.data.prepare import Phase, Work, sources, steps, streaming
from jaxtune.data.prepare import plan as plans
from jaxtune.errors import UserError
from jaxtune.parallel import hardware
from jaxtune.recipe import recipes
from jaxtune.recipe.flags import Command
from jaxtune.training.run_info import RunInfo


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Prepares `data.train` (or `data.sources`) in the workdir; returns `result.json`'s content.

    Leaves `tokenizer/` (where one was trained, or a copy of the one named), `train/` and `eval/` (tokens), and
    `eval.jsonl` (the held-out documents, from which generation takes its prompts). A recipe with steps, kinds of
    sources or another engine leaves `stats.json`, `manifest.json` and `set_aside.jsonl` (what was broken) too; one
    with a `data.format` of instruction or preference data leaves `train.jsonl` and `eval.jsonl` instead of tokens.

    Raises:
      UserError: the recipe or the data is wrong.
    """
    results = workdir / 'result.json'
    plan = check(config)
    prepare = functools.partial(_stream, config) if plan is None else functools.partial(_by_steps, config, plan)
    once(results.is_file, lambda: prepare(workdir, command), 'task=prepare')
    return read_json(results) or {'task': 'prepare', 'status': 'submitted', 'step': 0, 'metrics': {}}


def check(config: Settings) -> plans.Plan | None:
    """The plan of a recipe with steps, kinds of sources or another engine; None where documents are streamed.

    Raises:
      UserError: the recipe is wrong, packages are missing, or a step of the user's own is none.
    """
    data, defaults = config.data, cast(Settings, recipes.defaults())
    if not isinstance(data.train, str):
        raise UserError(f'data.train={", ".join(data.train)}: task=prepare mixes data.sources; expected them there')
    if not plans.needed(data, defaults.data):
        _check_raw('data.train', data.train)
        return None
    plans.check_installed(data.engine)
    plan = plans.make(data, config.tokenizer.path, tuple(config.tokenizer.add))
    for source in plan.sources:
        _check_raw(source.key, source.path)
    steps.asked_for(plan)
    return plan


def find_units(plan: plans.Plan) -> list[sources.Unit]:
    """What the sources of a plan hold.

    Raises:
      UserError: a source is not there, or none holds data.
    """
    units = [unit for number, source in enumerate(plan.sources) for unit in sources.units(number, source)]
    if not units:
        raise UserError(f'{plan.sources[0].key}={plan.sources[0].path}: no source holds data; expected files there')
    return units


def _check_raw(key: str, path: str) -> None:
    """Refuses a folder that preparing made, where what it is to be made of is expected."""
    folder = pathlib.Path(path).expanduser()
    if path and (folder / 'train').is_dir() and (folder / 'result.json').is_file():
        raise UserError(
            f'{key}={path}: what task=prepare made, expected what to make it of; to train on it leave the stage out '
            '(--config.stages=pretrain --config.pretrain.data.train=…)'
        )


def _stream(config: Settings, workdir: pathlib.Path, command: Command) -> None:
    info = RunInfo('prepare', command.argv, str(command.recipe))
    documents = streaming.collect(config.data)
    stream = streaming.Streaming(documents, config.data, config.tokenizer.path, workdir, tuple(config.tokenizer.add))
    console.note(f'reading {documents.name}; writing to {workdir}')
    _run_phases(stream.pipeline, info, lambda phase: phase.run())
    metrics = stream.metrics()
    info.write(workdir)
    report.finish(workdir, 'prepare', 0, metrics)
    _say(metrics, workdir, staged=getattr(command, 'workdir', workdir) != workdir)


def _by_steps(config: Settings, plan: plans.Plan, workdir: pathlib.Path, command: Command) -> None:
    from jaxtune.data.prepare import engines, phases  # of the data extra

    info, engine = RunInfo('prepare', command.argv, str(command.recipe)), config.data.engine
    units = find_units(plan)
    empty = [source for source in plan.sources if not any(plan.sources[unit.source] is source for unit in units)]
    for source in empty:
        console.note(f'{source.key}={source.path}: holds no data that can be read; set aside')
    plan = dataclasses.replace(plan, empty=tuple(source.path for source in empty))
    tasks = sources.tasks(units)
    work = Work((workdir / 'work').absolute(), plan, len(tasks))  # tasks may run in another folder
    _begin(work.folder, tasks, [sources.identity(units), dataclasses.asdict(plan)])
    labels = ', '.join(source.label for source in plan.sources)
    total = size(sum(unit.size for unit in units))
    console.note(f'reading {labels}: {total} in {len(tasks)} tasks; writing to {workdir}')
    pipeline = phases.pipeline(plan)
    if engine != 'slurm':
        workers = config.data.workers or hardware.cpu_cores()
        _run_phases(pipeline, info, lambda phase: engines.run(phase, work, engine, workers))
    elif not engines.built(work):
        _submit(pipeline, work, config.data)
        return
    stats = read_json(workdir / 'stats.json')
    info.write(workdir)
    _note_steps(workdir, work)
    metrics = _metrics(stats)
    report.finish(workdir, 'prepare', 0, metrics)
    _table(stats)
    if plan.records:
        console.note(f'next: train with data.train={workdir} data.format={plan.format} in a recipe')
    else:
        _say(metrics, workdir, staged=getattr(command, 'workdir', workdir) != workdir)
    shutil.rmtree(work.folder, ignore_errors=True)


def _run_phases(pipeline: Sequence[Phase], info: RunInfo, run_phase: Callable[[Phase], None]) -> None:
    for phase in pipeline:
        with info.timed(phase.name):
            run_phase(phase)


def _begin(folder: pathlib.Path, tasks: Sequence[Sequence[sources.Unit]], identity: list[Any]) -> None:
    """Lays out the tasks, unless they lie there from a run before this one over the same data."""
    identity = json.loads(json.dumps(identity))
    if read_json(folder / 'identity.json') == identity:
        return
    if folder.exists():
        shutil.rmtree(folder)
    for rank, units in enumerate(tasks):
        path = folder / 'tasks' / f'{rank:05d}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([dataclasses.asdict(unit) for unit in units]))
    write_json(folder / 'identity.json', identity)


def _submit(pipeline: list[Phase], work: Work, data: Settings) -> None:
    from jaxtune.data.prepare import engines  # of the data extra

    mark = work.folder / 'submitted'
    if mark.exists():
        console.note(f'submitted before, and not done yet; to submit what is left again, remove {mark}')
        return
    for script in engines.submit(pipeline, work, data.slurm, data.workers):
        console.note(f'--- {script}')
        console.note(script.read_text(encoding='utf-8').rstrip())
    if data.slurm.dry_run:
        console.note('data.slurm.dry_run: nothing was submitted')
        return
    mark.touch()
    console.note(f'submitted {len(pipeline)} jobs; when they are done, the same command ends the run')


def _note_steps(workdir: pathlib.Path, work: Work) -> None:
    """Adds what each step is about, and its processor seconds, to `run.json`, for the report."""
    seconds: dict[str, float] = {}
    for rank in range(work.tasks):
        for name, value in read_json(work.folder / 'stats' / f'collect-{rank:05d}.json')['seconds'].items():
            seconds[name] = seconds.get(name, 0.0) + value
    about = {step.name: step.about for step in steps.every(work.plan.custom_steps)}
    facts = {**read_json(workdir / 'run.json'), 'step_seconds': seconds, 'step_about': about}
    write_json(workdir / 'run.json', facts)


def _metrics(stats: dict[str, Any]) -> dict[str, Any]:
    sources = stats['sources'].values()
    metrics = {
        'data/collected_documents': sum(source.get('collected', 0) for source in sources),
        'data/documents': sum(source.get('kept', 0) for source in sources),
        'data/set_aside': len(stats['broken']),
    }
    for name, step in stats['steps'].items():
        if dropped := step['documents_in'] - step['documents_out']:
            metrics[f'data/dropped_{name.replace(" ", "_").replace("-", "_")}'] = dropped
    if 'train' not in stats:
        return metrics
    train, held_out = stats['train'], stats['eval']
    metrics |= {
        'data/train_documents': train['documents'],
        'data/eval_documents': held_out['documents'],
        'data/text_bytes': train['text_bytes'] + held_out['text_bytes'],
        'data/train_tokens': train['tokens'],
        'data/eval_tokens': held_out['tokens'],
        'data/bytes_per_token': train['text_bytes'] / max(1, train['tokens']),
        'data/vocab_size': stats['vocab_size'],
    }
    if held_out['gzip_bits_per_byte'] is not None:
        metrics['data/eval_gzip_bits_per_byte'] = held_out['gzip_bits_per_byte']
    return metrics


def _table(stats: dict[str, Any]) -> None:
    """What each step took and left, and why the rest went."""
    rows = [('step', 'documents', 'stayed', 'bytes', 'stayed', 'why the rest went')]
    for name, step in stats['steps'].items():
        reasons = sorted(step['dropped'].items(), key=lambda item: (-item[1]['documents'], item[0]))
        why = ', '.join(f'{reason} ({entry["documents"]:,})' for reason, entry in reasons[:3])
        more = f', {len(reasons) - 3} more' if len(reasons) > 3 else ''
        counts = step['documents_in'], step['documents_out'], size(step['bytes_in']), size(step['bytes_out'])
        rows.append((name, *counts, why + more))
    console.table(rows)
    for row in stats['broken'][:5]:
        console.note(f'set aside: {row["place"]}: {row["reason"]}')
    if len(stats['broken']) > 5:
        console.note(f'set aside: {len(stats["broken"]) - 5:,} more, in set_aside.jsonl')


def _say(metrics: dict, workdir: pathlib.Path, staged: bool) -> None:
    left_out = ''
    if 'data/dropped_short' in metrics:
        short, duplicates = metrics['data/dropped_short'], metrics['data/dropped_duplicates']
        left_out = f' ({short:,} short and {duplicates:,} duplicate ones left out)'
    console.note(
        f'{metrics["data/documents"]:,} documents{left_out}: {metrics["data/train_tokens"]:,} tokens to '
        f'train on, {metrics["data/eval_tokens"]:,} held out, {metrics["data/bytes_per_token"]:.2f} bytes a token '
        f'({metrics["data/vocab_size"]:,} in the vocabulary)'
    )
    ratio = metrics.get('data/eval_gzip_bits_per_byte')
    if ratio is not None:
        console.note(f'gzip -9 needs {ratio:.3f} bits per byte of the held-out documents')
    if not staged:
        names = ('data.train', 'data.eval', 'tokenizer.path')
        keys = [f'{name}={workdir}' for name in names if name != 'data.eval' or metrics['data/eval_documents']]
        console.note(f'next: train with {" ".join(keys)} in a recipe, such as')
        flags = ' '.join(f'--config.pretrain.{key}' for key in keys)
        console.note(f'python -m jaxtune.main --config configs/pretrain_causal_lm.py --config.stages=pretrain {flags}')
