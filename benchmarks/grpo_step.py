"""Times a step of GRPO as the command does it, and TRL's in the same run: sampling, reward, reference, updates.

    python benchmarks/grpo_step.py [full|lora] [--steps 3] [--rounds 1] [--without-trl]

A Llama of 29.5 M parameters with random weights (that of `train_step.py`), float32. A step answers 8 prompts of 64
words 8 times with 64 tokens each, at temperature 1, and makes 4 updates of 16 answers with AdamW; the KL term is on, so
both ask a reference. The reward is the share of words with an even number. LoRA has rank 16 on all linear layers.
Prints one JSON line a run: the median seconds of a step, sampled tokens per second over the whole step, and the
process's peak resident memory in MiB; and a last line with the ratios of the means (ours over TRL's). TRL runs before
and after every round.

Needs the `test` extra (torch, trl, peft).
"""

import argparse
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

from train_step import CONFIG, print_ratios, run

PROMPTS, WORDS, NEW, GROUP, ROLLOUTS, BATCH, LR, KL = 64, 64, 64, 8, 64, 16, 1e-6, 0.02
WARMUP = 2


def score(prompts, completions, **_) -> list[float]:
    """The reward: the share of words with an even number."""
    words = [completion.split() for completion in completions]
    return [sum(int(word[1:]) % 2 == 0 for word in each) / max(len(each), 1) for each in words]


def make_inputs(folder: pathlib.Path) -> None:
    """A model with a tokenizer of words `w0`, `w1`, … and prompts in them."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f'w{number}': number for number in range(CONFIG['vocab_size'] - 2)}
    special = {'<pad>': len(words), '<end>': len(words) + 1}
    tokenizer = Tokenizer(models.WordLevel(words | special, unk_token='<pad>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', eos_token='<end>')
    torch.manual_seed(0)
    ends = {'eos_token_id': special['<end>'], 'pad_token_id': special['<pad>'], 'bos_token_id': None}
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **ends))
    model.save_pretrained(folder / 'model')
    tokenizer.save_pretrained(folder / 'model')
    drawn = np.random.default_rng(0).integers(0, len(words), (PROMPTS, WORDS))
    lines = [json.dumps({'prompt': ' '.join(f'w{number}' for number in row)}) for row in drawn]
    (folder / 'prompts.jsonl').write_text('\n'.join(lines) + '\n')


def line(peer: str, method: str, seconds: list[float], tokens: float, memory: int) -> str:
    middle = statistics.median(seconds[WARMUP:])
    found = {'peer': peer, 'method': method, 'step_seconds': round(middle, 3)}
    return json.dumps(found | {'sampled_tokens_per_second': round(tokens / middle, 1), 'peak_rss_mib': memory})


def jaxtune(folder: pathlib.Path, method: str, steps: int) -> str:
    """One run of the command."""
    keys = {'model.path': folder / 'model', 'data.train': folder / 'prompts.jsonl', 'data.format': 'prompt'}
    keys |= {'data.seq_len': WORDS + NEW, 'rl.reward': 'grpo_step:score', 'rl.rollouts': ROLLOUTS, 'rl.group': GROUP}
    keys |= {'generate.max_new_tokens': NEW, 'generate.batch_size': ROLLOUTS, 'train.batch_size': BATCH}
    keys |= {'train.steps': WARMUP + steps, 'optimizer.lr': LR, 'rl.kl_coef': KL, 'method.name': method}
    keys |= {'checkpoint.every': 0}
    root = pathlib.Path(__file__).resolve().parent
    command = [sys.executable, '-m', 'jaxtune.main', f'--config={root.parent}/configs/grpo.py']
    with tempfile.TemporaryDirectory() as workdir:
        command += [f'--workdir={workdir}', *[f'--config.{name}={value}' for name, value in keys.items()]]
        path = os.pathsep.join([str(root), str(root.parent)])
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {'PYTHONPATH': path})
        lines = [json.loads(each) for each in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
    lines = [each for each in lines if 'train/step_seconds' in each]
    seconds = [each['train/step_seconds'] for each in lines]
    tokens = ROLLOUTS * statistics.mean(each['grpo/length'] for each in lines)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return line('jaxtune', method, seconds, tokens, memory)


def trl(folder: pathlib.Path, method: str, steps: int) -> str:
    """The same with TRL, in this process: a generation serves as many of its steps as there are updates."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    updates = ROLLOUTS // BATCH
    times, counts = [], []

    def counted(prompts, completions, **_):
        counts.extend(len(completion.split()) for completion in completions)
        return score(prompts, completions)

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step % updates == 0:
                times.append(time.perf_counter())

        def on_train_end(self, args, state, control, **_):
            times.append(time.perf_counter())

    settings = GRPOConfig(
        output_dir=str(folder / 'trl'),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy='no',
        logging_strategy='no',
        disable_tqdm=True,
        per_device_train_batch_size=BATCH,
        steps_per_generation=updates,
        num_generations=GROUP,
        max_completion_length=NEW,
        learning_rate=LR,
        beta=KL,
        max_steps=updates * (WARMUP + steps),
    )
    added = LoraConfig(r=16, lora_alpha=32, target_modules='all-linear') if method == 'lora' else None
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / 'model', dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / 'model'),
        reward_funcs=counted,
        args=settings,
        train_dataset=load_dataset('json', data_files=str(folder / 'prompts.jsonl'), split='train'),
        peft_config=added,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(times)]
    tokens = ROLLOUTS * statistics.mean(counts)
    return line('trl', method, seconds, tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def beside_trl(about: str | None, script: str, inputs: Callable, measures: Mapping[str, Callable], rate: str) -> None:
    """The command: measures `jaxtune` and `trl`, each in a process of its own, and prints the ratios of their means.

    Args:
      about: the help's text.
      script: the file that is the command.
      inputs: writes into a folder what both read.
      measures: `jaxtune` and `trl` -> `(folder, method, steps) -> line`.
      rate: name in the lines of what a second brings.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('method', nargs='?', default='full', choices=['full', 'lora'])
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--without-trl', action='store_true')
    parser.add_argument('--inside', nargs=2, metavar=('WHO', 'FOLDER'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds={args.rounds}: expected 1 or more')
    if args.inside:
        who, folder = args.inside[0], pathlib.Path(args.inside[1])
        if who == 'inputs':
            inputs(folder)
            return
        print(measures[who](folder, args.method, args.steps), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:

        def command(who: str) -> list[str]:
            return [sys.executable, script, args.method, f'--steps={args.steps}', '--inside', who, folder]

        subprocess.run(command('inputs'), check=True)
        theirs, mine = [] if args.without_trl else run(command('trl')), []
        for _ in range(args.rounds):
            mine += run(command('jaxtune'))
            theirs += [] if args.without_trl else run(command('trl'))
    if theirs:
        print_ratios(args.method, mine, theirs, rate, 'peak_rss_mib')


if __name__ == '__main__':
    beside_trl(__doc__, __file__, make_inputs, {'jaxtune': jaxtune, 'trl': trl}, 'sampled_tokens_per_second')
