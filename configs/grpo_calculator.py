"""Let a model find out what brings reward while a calculator answers what it asks (GRPO with an environment).

    python -m jaxtune.main --config configs/grpo_calculator.py \
        --config.model.path=MODEL_FOLDER_OR_WORKDIR \
        --config.data.train=questions.jsonl --config.data.eval=held_out.jsonl

Where the model writes `<calc>12 + 34</calc>`, ` = 46` follows, and the model goes on; what the calculator wrote is
read, and not learnt. In conversations whose template takes tools, the model is told of the tool `calculator`, and a
call of it is answered by a turn. `rl.reward=math` compares the last number of an answer with the record's.
`rl.environment=python` runs programs between `<python>` and `</python>` in a sandbox, and `module:NAME` is an
environment of your own.

A model that never writes the tag gets no reply: show it some, in a tuning before this one or in `sft.system`.
`configs/arithmetic.py` does so from nothing, and gives figures. The rate suits small models; take 1e-6 for published
ones, and on an accelerator add `--config.model.compute_dtype=bfloat16 --config.generate.batch_size=64`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'grpo'
    config.data = ConfigDict({'seq_len': 512})
    config.generate = ConfigDict({'max_new_tokens': 256, 'batch_size': 32, 'prompts': 64})
    config.rl = ConfigDict({'reward': 'math', 'environment': 'calculator', 'max_turns': 8})
    config.rl.update({'rollouts': 64, 'group': 8, 'epochs': 1, 'kl_coef': 0.02})
    config.train = ConfigDict({'steps': 100, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-4, 'schedule': 'constant', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 20})
    config.log = ConfigDict({'every': 1})
    return config
