"""Times one update of a small Llama, and another trainer's beside it in the same run.

    python benchmarks/train_step.py [full|lora|qlora] [--steps 5] [--batch 8] [--length 512] [--beside "COMMAND"]
        [--rounds 1]

The model is a Llama of 29.5 M parameters (hidden 512, MLP 1376, 8 layers, 8 heads, vocabulary 8192, tied), float32,
AdamW, no padding, random tokens; LoRA has rank 16 on all linear layers. Prints one JSON line a method: the median step
time in seconds, tokens per second, and the process's peak resident memory in MiB. With `--beside`, the command (which
prints lines of the same shape) runs before and after every round, since machines drift, and a last line gives the ratio
of the means.
"""

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time

from jaxtune.common import huge_pages

CONFIG = {
    'model_type': 'llama',
    'vocab_size': 8192,
    'hidden_size': 512,
    'intermediate_size': 1376,
    'num_hidden_layers': 8,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
    'max_position_embeddings': 1024,
    'tie_word_embeddings': True,
}


def measure(
    method: str, steps: int, batch_size: int, length: int, accumulate: int, fields: dict | None = None, **settings: str
) -> dict:
    """Seconds of one update, two updates for warming up left out.

    `fields` are the model's, those of CONFIG by default; `settings` keys of a recipe's `model`.
    """
    import jax
    import numpy as np

    from jaxtune import models
    from jaxtune.methods import apply
    from jaxtune.parallel import make_mesh, place
    from jaxtune.recipe import recipes
    from jaxtune.tasks import specs
    from jaxtune.training.program import make_program

    config = recipes.defaults()
    changes = {'method.name': method, 'train.batch_size': batch_size, 'train.accumulate': accumulate}
    changes |= {f'model.{name}': value for name, value in settings.items()}
    recipes.apply_overrides(
        config, {**changes, 'data.seq_len': length, 'optimizer.schedule': 'constant', 'optimizer.lr': 1e-4}
    )
    fields = fields or CONFIG
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        dtypes = {name: config.model[name] for name in ('param_dtype', 'compute_dtype')}
        model = models.build(models.read_config(fields), remat=config.model.remat, **dtypes)
        tuning = specs.method(config)
        codecs = apply.codecs(tuning, model)
        params = jax.jit(lambda key: apply.encoded(model.init(key), codecs))(jax.random.key(0))
        params = apply.attach(lambda params: apply.begin(tuning, model, params, frozenset()), params, mesh)
        trainable, frozen = apply.partition(tuning.method, params, frozenset())
        del params
        keys = {'optimizer': config.optimizer, 'batch_size': batch_size, 'method': tuning}
        program = make_program(mesh, model, trainable, specs.objective(config), steps=steps, **keys)
        state = program.init_state(trainable)
        step = program.train_step(accumulate).lower(state, frozen, program.batch_shapes()).compile()
        tokens = np.random.default_rng(0).integers(0, fields['vocab_size'], (batch_size, length)).astype(np.int32)
        rows = {
            'tokens': tokens,
            'targets': np.roll(tokens, -1, axis=1),
            'loss_mask': (np.arange(length) < length - 1).astype(np.float32) * np.ones(tokens.shape, np.float32),
            'positions': np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
            'segment_ids': np.ones(tokens.shape, np.int32),
        }
        batch = place(lambda low, high: {name: value[low:high] for name, value in rows.items()}, batch_size, mesh)
        seconds = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            metrics['loss'].block_until_ready()
            jax.block_until_ready(state['step'])
            seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds[2:])
    return {
        'peer': 'jaxtune',
        'method': method,
        'step_seconds': round(step_seconds, 3),
        'tokens_per_second': round(batch_size * length / step_seconds, 1),
        'peak_rss_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def run(command: list[str]) -> list[dict]:
    """Runs a benchmark in a process of its own and returns its lines, printed as they come.

    This process stays small: a child's peak memory counts what its parent held when it was started.
    """
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith('{'):
                lines.append(json.loads(line))
                print(line, end='', flush=True)
    if process.returncode or not lines:
        raise SystemExit(f'{shlex.join(command)}: exit status {process.returncode}, {len(lines)} lines')
    return lines


def ratio(name: str, mine: list[dict], theirs: list[dict]) -> float:
    """The mean of a number in our lines, over its mean in theirs."""
    return round(statistics.mean(line[name] for line in mine) / statistics.mean(line[name] for line in theirs), 3)


def print_ratios(method: str, mine: list[dict], theirs: list[dict], *names: str) -> None:
    """The last line: the ratios of the means of these numbers."""
    ratios = {f'{name}_ratio': ratio(name, mine, theirs) for name in names}
    print(json.dumps({'method': method, 'beside': theirs[0]['peer'], **ratios}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('method', nargs='?', default='full', choices=['full', 'lora', 'qlora'])
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--length', type=int, default=512)
    parser.add_argument('--accumulate', type=int, default=1)
    parser.add_argument('--beside', default='', metavar='COMMAND')
    parser.add_argument('--rounds', type=int, default=1)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds={args.rounds}: expected 1 or more')
    if not args.beside:
        huge_pages.begin()  # as the command does
        print(json.dumps(measure(args.method, args.steps, args.batch, args.length, args.accumulate)), flush=True)
        return
    other, ours = shlex.split(args.beside), [sys.executable, __file__, args.method]
    for name in ('steps', 'batch', 'length', 'accumulate'):
        ours += [f'--{name}', str(getattr(args, name))]
    lines = run(other)
    for _ in range(args.rounds):
        lines += run(ours) + run(other)
    mine = [line for line in lines if line['peer'] == 'jaxtune']
    theirs = [line for line in lines if line['peer'] != 'jaxtune' and line['method'] == args.method]
    print_ratios(args.method, mine, theirs, 'tokens_per_second', 'peak_rss_mib')


if __name__ == '__main__':
    main()
