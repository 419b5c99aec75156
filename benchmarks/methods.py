"""Compares the tuning methods on one model and one text: each at its best of three learning rates.

    python benchmarks/methods.py MODEL TRAIN.jsonl EVAL.jsonl WORKDIR [--steps 200] [--text-key text] [--set KEY=VALUE]
        [--rows full,lora]

Prints a table, a row as soon as its three runs are over: held-out loss before and after, the share of full tuning's
drop that the method recovers, what trains, seconds an update, and the process's peak memory. Full tuning is always the
first row: the others are measured against it.
"""

import argparse
import json
import pathlib

from recipe_runs import run_recipe

# Rows of the table: what is set beside the method's defaults, and three learning rates.
ROWS = {
    'full': ({'name': 'full'}, (3e-4, 1e-3, 3e-3)),
    'lora': ({'name': 'lora'}, (3e-3, 1e-2, 3e-2)),
    'qlora': ({'name': 'qlora'}, (3e-3, 1e-2, 3e-2)),
    'qlora+loftq': ({'name': 'qlora', 'init': 'loftq'}, (3e-3, 1e-2, 3e-2)),
    'adapter': ({'name': 'adapter'}, (3e-3, 1e-2, 3e-2)),
    'prompt': ({'name': 'prompt'}, (3e-2, 1e-1, 3e-1)),
}


def run(recipe: str, workdir: pathlib.Path, keys: dict) -> dict:
    """Runs a recipe; returns its metrics and what it said of the model."""
    return run_recipe(recipe, workdir, keys) | json.loads((workdir / 'run.json').read_text())['model']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('model', 'train', 'eval', 'workdir'):
        parser.add_argument(name)
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--text-key', default='text')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE')
    parser.add_argument('--rows', default=','.join(ROWS), help='some of the rows, with commas between (default: all)')
    args = parser.parse_args()
    if unknown := set(args.rows.split(',')) - set(ROWS):
        parser.error(f'--rows={args.rows}: no row {", ".join(sorted(unknown))}; expected some of {", ".join(ROWS)}')
    workdir = pathlib.Path(args.workdir)
    common = {'model.path': args.model, 'data.eval': args.eval, 'data.text_key': args.text_key}
    common |= dict(pair.split('=', 1) for pair in args.set)
    score = {name: value for name, value in common.items() if not name.startswith(('train.', 'optimizer.'))}
    before = run('evaluate.py', workdir / 'before', score)['eval/loss']
    print(f'before: {before:.4f}')
    print('method       rate    loss    recovered  trainable      s/update  peak MiB', flush=True)
    for row in dict.fromkeys(['full', *args.rows.split(',')]):
        method, rates = ROWS[row]
        found = []
        for rate in rates:
            keys = common | {f'method.{key}': value for key, value in method.items()} | {
                'data.train': args.train, 'train.steps': args.steps, 'optimizer.lr': rate,
                'optimizer.weight_decay': 0.0, 'optimizer.warmup_steps': args.steps // 10, 'eval.every': 0,
                'eval.patience': 0,
            }  # fmt: skip
            found.append(run('finetune_full.py', workdir / f'{row}-{rate:g}', keys) | {'rate': rate})
        best = min(found, key=lambda each: each['eval/loss'])
        if row == 'full':
            drop = before - best['eval/loss']
        print(
            f'{row:12} {best["rate"]:<7g} {best["eval/loss"]:.4f}  {(before - best["eval/loss"]) / drop:8.1%}  '
            f'{best["trainable"]:>10,}  {best["train/step_seconds"]:8.3f}  {best["memory/peak_bytes"] >> 20:,}',
            flush=True,
        )


if __name__ == '__main__':
    main()
