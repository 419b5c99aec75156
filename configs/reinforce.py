"""The policy gradient itself: answers above their group's mean become likelier (REINFORCE, Williams 1992).

    python -m jaxtune.main --config configs/reinforce.py \
        --config.model.path=MODEL_FOLDER_OR_WORKDIR --config.rl.reward=math \
        --config.data.train=questions.jsonl --config.data.eval=held_out.jsonl

R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", Machine
Learning 8, 1992. The baseline is the mean of a group (`rl.advantage=group_mean`), the divergence from the reference is
taken off the reward, the loss sums over an answer's tokens, and each step makes one update of all its answers: every
ratio is 1, and nothing is clipped. A little entropy (`rl.entropy_coef`) keeps the policy from settling early.

The plainest of the family, and the one to compare others with; its gradient is RLOO's (`configs/rloo.py`) but for a
factor of (group - 1) / group. Expect noisier rewards than `configs/grpo.py`.

With these keys a small model from scratch that is rewarded for each `e` among twelve tokens (`optimizer.lr=4e-3`, two
epochs, two CPU cores) went from 0.05 to 8.2 in 24 steps of 64 answers, GRPO to 10.0; not tried on large models.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'grpo'
    config.data = ConfigDict({'seq_len': 256})
    config.generate = ConfigDict({'max_new_tokens': 64, 'batch_size': 32, 'prompts': 64})
    config.rl = ConfigDict({'rollouts': 64, 'group': 4, 'epochs': 1, 'kl_coef': 0.02, 'kl_in': 'reward'})
    config.rl.update({'advantage': 'group_mean', 'normalise': 'constant', 'entropy_coef': 0.001})
    config.train = ConfigDict({'steps': 100, 'batch_size': 64})
    config.optimizer = ConfigDict({'lr': 1e-4, 'schedule': 'constant', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 20})
    config.log = ConfigDict({'every': 1})
    return config
