"""REINFORCE with the other answers of a group as its baseline (RLOO, arXiv:2402.14740).

    python -m jaxtune.main --config configs/rloo.py \
        --config.model.path=SFT_WORKDIR --config.rl.reward=REWARD_WORKDIR \
        --config.data.train=prompts.jsonl --config.data.eval=held_out.jsonl

An answer is measured by the mean of the others to its prompt (`rl.advantage=leave_one_out`), which leaves the gradient
unbiased. An answer is one action: its divergence from the reference is taken off its reward (`rl.kl_in=reward`), and
the loss sums over its tokens (`rl.normalise=constant`; the constant is one factor of the rate). Each step makes one
update of all its answers, so that every ratio is 1 and nothing is clipped.

Expect what `configs/ppo.py` reaches without a value head to train; `rl.reward` and data as there.

With these keys a small model from scratch that is rewarded for each `e` among twelve tokens (`optimizer.lr=4e-3`, two
epochs, two CPU cores) went from 0.05 to 8.8 in 24 steps of 64 answers, GRPO to 10.0; not tried at the size of the
paper.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'grpo'
    config.data = ConfigDict({'seq_len': 256})
    config.generate = ConfigDict({'max_new_tokens': 64, 'batch_size': 32, 'prompts': 64})
    config.rl = ConfigDict({'rollouts': 64, 'group': 4, 'epochs': 1, 'kl_coef': 0.05, 'kl_in': 'reward'})
    config.rl.update({'advantage': 'leave_one_out', 'normalise': 'constant'})
    config.train = ConfigDict({'steps': 100, 'batch_size': 64})
    config.optimizer = ConfigDict({'lr': 1e-4, 'schedule': 'constant', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 20})
    config.log = ConfigDict({'every': 1})
    return config
