"""Let a model write what a reward model prefers (PPO, as InstructGPT did): the last step of SFT, reward model, PPO.

    python -m jaxtune.main --config configs/ppo.py \
        --config.model.path=SFT_WORKDIR --config.rl.reward=REWARD_WORKDIR \
        --config.data.train=prompts.jsonl --config.data.eval=held_out.jsonl

`data.*` hold conversations (their last question is asked), or texts to go on from (`--config.data.format=prompt`).
`rl.reward` is the workdir of `configs/reward_model.py`, any sequence classifier with one label, or `module:function`
of three lists, prompts, completions and references, that returns a number for each. A step samples `rl.rollouts`
answers and learns from each `rl.epochs` times; a token costs `rl.kl_coef` for every nat above the model of the start.
`--config.method.name=lora` keeps the reference for nothing: it is the frozen base.

Tried on two CPU cores, from the quickstart's `sft` and `reward`, with `python-stdlib` as both kinds of data
(`data.format=alpaca`, `generate.max_new_tokens=32`, `train.steps=20`): 5 min 14 s, held-out reward 0.5 before, 6.3
after, 12 nats an answer from the start.

Watch `ppo/reward` beside `ppo/kl`: a reward that rises while answers get odd asks for more `rl.kl_coef`. The rate suits
small models; take 1e-6 to 1e-5 for published ones, and on an accelerator add
`--config.model.compute_dtype=bfloat16 --config.generate.batch_size=64`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'ppo'
    config.data = ConfigDict({'seq_len': 256})
    config.generate = ConfigDict({'max_new_tokens': 64, 'batch_size': 32, 'prompts': 64})
    config.rl = ConfigDict({'rollouts': 64, 'epochs': 2, 'kl_coef': 0.05})
    config.train = ConfigDict({'steps': 100, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-4, 'new_lr': 1e-3, 'schedule': 'constant', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 20})
    config.log = ConfigDict({'every': 1})
    return config
