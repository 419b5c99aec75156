"""Train a few tokens that stand before every text, and nothing else: prompt tuning.

    python -m jaxtune.main --config configs/prompt_tuning.py \
        --config.model.path=MODEL_FOLDER_OR_HUB_ID --config.data.train=train.jsonl

Without flags it tunes what configs/quickstart.py trained, on the same text; `--config.data.eval=eval.jsonl` adds scores
of held-out text, and stops when they no longer improve. Leaves `adapter/`, which Hugging Face `peft`
loads; score it or let it write with `--config.model.path=WORKDIR`. `method.init_text` begins with a text's embeddings
instead of random tokens'. Large learning rates suit it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.model = ConfigDict({'path': 'runs/quickstart/pretrain'})
    config.method = ConfigDict({'name': 'prompt', 'virtual_tokens': 20})
    config.data = ConfigDict({'train': 'runs/quickstart/prepare', 'seq_len': 512})
    config.train = ConfigDict({'steps': 200, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 3e-2, 'warmup_steps': 20, 'schedule': 'cosine', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 50, 'batches': 20, 'patience': 3})
    return config
