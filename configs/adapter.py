"""Small trained networks inside every layer of your own model, which stays as it is: bottleneck adapters.

    python -m jaxtune.main --config configs/adapter.py \
        --config.model.path=MODEL_FOLDER_OR_HUB_ID --config.data.train=train.jsonl

Without flags it tunes what configs/quickstart.py trained, on the same text; `--config.data.eval=eval.jsonl` adds scores
of held-out text, and stops when they no longer improve. Leaves `adapter/`; score it or let it write
with `--config.model.path=WORKDIR`. Adapters bend what flows through a layer and cannot be merged into its weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.model = ConfigDict({'path': 'runs/quickstart/pretrain'})
    config.method = ConfigDict({'name': 'adapter', 'bottleneck': 64, 'placement': 'houlsby'})
    config.data = ConfigDict({'train': 'runs/quickstart/prepare', 'seq_len': 512})
    config.train = ConfigDict({'steps': 200, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-3, 'warmup_steps': 20, 'schedule': 'cosine', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 50, 'batches': 20, 'patience': 3})
    return config
