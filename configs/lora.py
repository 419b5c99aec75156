"""Tune a few million weights beside your own model, which stays as it is: LoRA.

    python -m jaxtune.main --config configs/lora.py \
        --config.model.path=MODEL_FOLDER_OR_HUB_ID --config.data.train=train.jsonl

`train.jsonl` holds texts, or conversations in any of the formats of `data.format`, of which the answers are trained.
Without flags it tunes what configs/quickstart.py trained, on the same text; `--config.data.eval=eval.jsonl` adds scores
of held-out text, and stops when they no longer improve. Leaves `adapter/`, which Hugging Face
`peft` loads, and `export/`, the model with the adapter merged in. `method.rslora`, `method.dora` and
`method.init=pissa` are variants; `method.path` goes on from an adapter, `peft`'s too.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.model = ConfigDict({'path': 'runs/quickstart/pretrain'})
    config.method = ConfigDict({'name': 'lora', 'rank': 16, 'alpha': 32.0, 'targets': 'all-linear'})
    config.data = ConfigDict({'train': 'runs/quickstart/prepare', 'seq_len': 512})
    config.train = ConfigDict({'steps': 200, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 2e-4, 'warmup_steps': 20, 'schedule': 'cosine', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 50, 'batches': 20, 'patience': 3})
    return config
