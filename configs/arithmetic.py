"""Sums of two-digit numbers, from nothing: half-right demonstrations, then what is right is found out (GRPO).

    python -m jaxtune.main --config configs/arithmetic.py
    python -m jaxtune.main --config configs/arithmetic.py --workdir runs/arithmetic_calculator \
        --config.grpo.rl.environment=calculator

The data is made here, and no file is needed. A Llama of 0.5 million parameters over bytes is tuned on demonstrations
whose answer is right in four of ten, and of which some ask a calculator; then it answers sums, and the reward `math`
tells which answers are right. With `rl.environment=calculator` what it asks the calculator is answered.

Tried in part, on two CPU cores shared with other work: after `sft` (1,000 updates) 0.29 of 256 held-out sums are right,
and 0.47 with the calculator. In 20 steps of GRPO without it, 2 seconds each, the reward of sampled answers rose from
0.29 (steps 1 to 12) to 0.36 (steps 13 to 20); the rest has not been run. A rate of 1e-3 is too much: the held-out
reward was 0.01 after 20 steps.
"""

import json
import os
import pathlib
import random
import tempfile

from ml_collections import ConfigDict

RIGHT, ASKING = 0.4, 0.2  # shares of the demonstrations


def demonstrations() -> list[dict[str, str]]:
    """Sums with answers, of which some are right, and some ask a calculator."""
    rng = random.Random(0)
    records = []
    for _ in range(20_000):
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        answer = a + b if rng.random() < RIGHT else a + b + rng.choice([-20, -10, 10, 20])
        asked = f'<calc>{a}+{b}</calc> = ' if rng.random() < ASKING else ''
        records.append({'prompt': f'{a}+{b}=', 'completion': f'{asked}{answer}'})
    return records


def sums(seed: int, count: int) -> list[dict[str, str]]:
    """Sums with what they are."""
    rng = random.Random(seed)
    pairs = [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(count)]
    return [{'prompt': f'{a}+{b}=', 'completion': str(a + b)} for a, b in pairs]


def written(name: str, records: list[dict[str, str]]) -> str:
    """The path of a file of records, in a folder for temporary files."""
    folder = pathlib.Path(tempfile.gettempdir()) / f'jaxtune-arithmetic-{os.getuid()}'
    folder.mkdir(mode=0o700, exist_ok=True)
    text = ''.join(json.dumps(record) + '\n' for record in records)
    path = folder / f'{name}.jsonl'
    if not path.is_file() or path.read_text() != text:
        part = folder / f'{name}.{os.getpid()}.part'
        part.write_text(text)
        part.replace(path)
    return str(path)


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('sft', 'grpo')

    config.sft = ConfigDict()
    config.sft.task = 'train'
    config.sft.objective = 'sft'
    config.sft.tokenizer = ConfigDict({'path': 'bytes'})
    config.sft.model = ConfigDict()
    config.sft.model.config = ConfigDict(
        {
            'model_type': 'llama',
            'hidden_size': 128,
            'intermediate_size': 384,
            'num_hidden_layers': 2,
            'num_attention_heads': 4,
            'num_key_value_heads': 4,
            'max_position_embeddings': 256,
            'tie_word_embeddings': True,
        }
    )
    config.sft.data = ConfigDict({'train': written('sft', demonstrations()), 'format': 'prompt', 'seq_len': 192})
    config.sft.train = ConfigDict({'steps': 1000, 'batch_size': 8, 'accumulate': 1})
    config.sft.optimizer = ConfigDict({'lr': 2e-3, 'warmup_steps': 50, 'b2': 0.98})

    config.grpo = ConfigDict()
    config.grpo.task = 'grpo'
    config.grpo.model = ConfigDict({'path': '@sft'})
    config.grpo.data = ConfigDict(
        {'train': written('train', sums(1, 4000)), 'eval': written('eval', sums(2, 256)), 'format': 'prompt'}
    )
    config.grpo.data.seq_len = 48
    config.grpo.generate = ConfigDict({'max_new_tokens': 32, 'batch_size': 64})
    config.grpo.rl = ConfigDict({'reward': 'math', 'rollouts': 128, 'group': 8, 'epochs': 1, 'kl_coef': 0.0})
    config.grpo.train = ConfigDict({'steps': 100, 'batch_size': 64, 'accumulate': 1})
    config.grpo.optimizer = ConfigDict({'lr': 3e-4, 'schedule': 'constant', 'weight_decay': 0.0})
    config.grpo.eval = ConfigDict({'every': 20})
    config.grpo.log = ConfigDict({'every': 1})
    return config
