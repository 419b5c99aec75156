"""Running the tasks of a recipe in order, each in its own folder, and finding one stage's output from another."""

import functools
import importlib

from jaxtune import console, recipes, workdir
from jaxtune.errors import UserError
from jaxtune.flags import Command
from jaxtune.parallel import hosts

# Each task is `run(config, workdir, command) -> metrics of result.json`, in the module named here.
TASKS = {
    'prepare': 'jaxtune.prepare',
    'train': 'jaxtune.train',
    'ppo': 'jaxtune.rl.loop',
    'grpo': 'jaxtune.rl.loop',
    'evaluate': 'jaxtune.evaluate',
    'generate': 'jaxtune.generate',
    'export': 'jaxtune.export',
    'compile': 'jaxtune.compile',
}


def run(command: Command) -> None:
    """Runs every stage that has not finished yet; or with `command.check`, checks them all."""
    for name in command.configs:
        if command.configs[name].task not in TASKS:
            prefix = f'{name}.' if name else ''
            raise UserError(f'{prefix}task={command.configs[name].task!r}: expected one of {", ".join(TASKS)}')
    if command.check:
        from jaxtune import preflight

        console.note(preflight.check(command))
        return
    staged = '' not in command.configs
    results = dict(command.finished)
    for name, config in command.configs.items():
        folder = command.workdir / name if name else command.workdir
        if staged:
            console.note(f'stage {name} ({config.task}) in {folder}')
        inputs = {other: workdir.mark(command.workdir / other) for other in recipes.references(config)}
        finished = hosts.from_primary(functools.partial(workdir.claim, folder, config, command.overwrite, inputs))
        if finished is None:
            module = importlib.import_module(TASKS[config.task])
            finished = module.run(recipes.point_to_stages(config, command.workdir), folder, command)
        else:
            console.note(f'already done: {folder}/result.json (another --workdir starts anew)')
        results[name] = finished
    if staged and console.is_primary():
        from jaxtune.report import write_report

        last = list(results)[-1]
        metrics = {
            f'{name}/{key}': value for name, result in results.items() for key, value in result['metrics'].items()
        }
        workdir.write_json(
            command.workdir / 'result.json',
            {
                'task': 'stages',
                'status': 'done',
                'step': results[last]['step'],
                'metrics': metrics,
                'stages': list(results),
            },
        )
        write_report(command.workdir)
