"""TODO

    python -m jaxtune.main --config configs/distill.py \
        --config.distill.teacher=TEACHER --config.model.path=STUDENT --config.data.train=train.jsonl
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.objective = 'distill'
    config.data = ConfigDict({'seq_len': 256})
    config.train = ConfigDict({'epochs': 1.0, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-4, 'warmup_steps': 20, 'schedule': 'cosine', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 100})
    return config
