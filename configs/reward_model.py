"""Train a reward model on pairs of answers, the better one `chosen`, the other `rejected`.

    python -m jaxtune.main --config configs/reward_model.py \
        --config.model.path=MODEL_FOLDER_OR_WORKDIR --config.data.train=train.jsonl --config.data.eval=eval.jsonl

Records hold `prompt`, `chosen` and `rejected` as texts or lists of messages, maybe `margin`; or two whole dialogues.
Held-out accuracy is printed beside that of always preferring the longer answer. `export/` is a sequence classifier with
one label in `transformers`.

The rate suits small models; take 1e-5 for published ones, and on an accelerator add
`--config.model.compute_dtype=bfloat16`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.objective = 'reward'
    config.data = ConfigDict({'seq_len': 256})
    config.train = ConfigDict({'epochs': 2.0, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 3e-4, 'new_lr': 1e-3, 'warmup_steps': 20, 'schedule': 'cosine'})
    config.optimizer.weight_decay = 0.0
    config.eval = ConfigDict({'every': 100, 'metric': 'eval/accuracy'})
    return config
