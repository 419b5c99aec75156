"""Times a step of PPO as the command does it, and TRL's in the same run: sampling, reward, reference, values, updates.

    python benchmarks/ppo_step.py [full|lora] [--steps 3] [--rounds 1] [--without-trl]

Policy, reference and reward model are Llamas of 29.5 M parameters with random weights (that of `train_step.py`, the
reward model with a scalar head), float32; so is TRL's value model, where ours is a head on the policy. A step answers
16 prompts of 64 words with 64 tokens each, at temperature 1, and makes 4 updates of all 16 answers with AdamW.
LoRA has rank 16 on all linear layers. Prints one JSON line a run: the median seconds of a step, samples (prompt and
answer) per second, and the process's peak resident memory in MiB; and a last line with the ratios of the means (ours
over TRL's). TRL runs before and after every round.

Needs the `test` extra (torch, trl, peft).
"""

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

from grpo_step import NEW, WORDS, beside_trl, make_inputs
from train_step import CONFIG

BATCH, EPOCHS, LR, KL = 16, 4, 3e-6, 0.05
WARMUP = 1


def make_reward(folder: pathlib.Path) -> None:
    """The reward model's folder, with the policy's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder / 'model')
    ends = {'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id, 'bos_token_id': None}
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig(**CONFIG, **ends, num_labels=1))
    model.save_pretrained(folder / 'reward')
    tokenizer.save_pretrained(folder / 'reward')


def inputs(folder: pathlib.Path) -> None:
    """What both read: policy, prompts, reward model."""
    make_inputs(folder)
    make_reward(folder)


def line(peer: str, method: str, seconds: list[float], memory: int) -> str:
    middle = statistics.median(seconds[WARMUP:])
    found = {'peer': peer, 'method': method, 'step_seconds': round(middle, 3)}
    return json.dumps(found | {'samples_per_second': round(BATCH / middle, 3), 'peak_rss_mib': memory})


def jaxtune(folder: pathlib.Path, method: str, steps: int) -> str:
    """One run of the command."""
    keys = {'model.path': folder / 'model', 'data.train': folder / 'prompts.jsonl', 'data.format': 'prompt'}
    keys |= {'data.seq_len': WORDS + NEW, 'rl.reward': folder / 'reward', 'rl.rollouts': BATCH, 'rl.epochs': EPOCHS}
    keys |= {'generate.max_new_tokens': NEW, 'generate.batch_size': BATCH, 'train.batch_size': BATCH}
    keys |= {'train.steps': WARMUP + steps, 'optimizer.lr': LR, 'rl.kl_coef': KL, 'method.name': method}
    keys |= {'checkpoint.every': 0}
    root = pathlib.Path(__file__).resolve().parent
    command = [sys.executable, '-m', 'jaxtune.main', f'--config={root.parent}/configs/ppo.py']
    with tempfile.TemporaryDirectory() as workdir:
        command += [f'--workdir={workdir}', *[f'--config.{name}={value}' for name, value in keys.items()]]
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {'PYTHONPATH': str(root.parent)})
        lines = [json.loads(each) for each in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
    seconds = [each['train/step_seconds'] for each in lines if 'train/step_seconds' in each]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return line('jaxtune', method, seconds, memory)


def trl(folder: pathlib.Path, method: str, steps: int) -> str:
    """The same with TRL, in this process."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    updates, times = WARMUP + steps, []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            times.append(time.perf_counter())

        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter())

    settings = PPOConfig(
        output_dir=str(folder / 'trl'),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to='none',
        save_strategy='no',
        logging_steps=1000,
        disable_tqdm=True,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=BATCH,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        num_sample_generations=0,
        total_episodes=BATCH * updates,
        response_length=NEW,
        temperature=1.0,
        learning_rate=LR,
        kl_coef=KL,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / 'model', padding_side='left')
    data = load_dataset('json', data_files=str(folder / 'prompts.jsonl'), split='train')
    data = data.map(lambda row: {'input_ids': tokenizer(row['prompt']).input_ids}, remove_columns=data.column_names)

    def scalar() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(folder / 'reward', dtype=torch.float32)

    def policy() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / 'model', dtype=torch.float32)

    added = LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM')
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy(),
        ref_model=None if method == 'lora' else policy(),
        reward_model=scalar(),
        value_model=scalar(),
        train_dataset=data,
        eval_dataset=data.select(range(BATCH)),
        peft_config=added if method == 'lora' else None,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return line('trl', method, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == '__main__':
    beside_trl(__doc__, __file__, inputs, {'jaxtune': jaxtune, 'trl': trl}, 'samples_per_second')
