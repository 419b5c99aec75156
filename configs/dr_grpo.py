"""GRPO without its two biases, towards long wrong answers and easy or hard prompts (Dr. GRPO, arXiv:2503.20783).

    python -m jaxtune.main --config configs/dr_grpo.py \
        --config.model.path=MODEL_FOLDER_OR_WORKDIR --config.rl.reward=math \
        --config.data.train=questions.jsonl --config.data.eval=held_out.jsonl

An answer is measured by its group's mean alone, without the standard deviation (`rl.advantage=group_mean`), and the sum
over its tokens is divided by `generate.max_new_tokens` whatever its length (`rl.normalise=constant`); there is no KL
penalty. `math` compares the last number, or what a `boxed` holds, with the record's answer: see `configs/grpo.py` for
other rewards, kinds of data and rates.

Expect the reward of `configs/grpo.py`, and a `grpo/length` that does not grow where the reward stands still. Not tried
at the size of the paper.

With these keys a small model from scratch that is rewarded for each `e` among twelve tokens (`optimizer.lr=4e-3`, two
epochs, two CPU cores) went from 0.05 to 9.1 in 24 steps of 64 answers, GRPO to 10.0; not tried at the size of the
paper.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'grpo'
    config.data = ConfigDict({'seq_len': 256})
    config.generate = ConfigDict({'max_new_tokens': 64, 'batch_size': 32, 'prompts': 64})
    config.rl = ConfigDict({'rollouts': 64, 'group': 8, 'epochs': 1, 'kl_coef': 0.0})
    config.rl.update({'advantage': 'group_mean', 'normalise': 'constant'})
    config.train = ConfigDict({'steps': 100, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-4, 'schedule': 'constant', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 20})
    config.log = ConfigDict({'every': 1})
    return config
