"""LoRA beside a model of four bits a weight: QLoRA, for models that hardly fit.

    python -m jaxtune.main --config configs/qlora.py \
        --config.model.path=MODEL_FOLDER_OR_HUB_ID --config.data.train=train.jsonl

Without flags it tunes what configs/quickstart.py trained, on the same text; `--config.data.eval=eval.jsonl` adds scores
of held-out text, and stops when they no longer improve. Kernels become NF4 while they are read, so
that the wide model is never in memory; the optimizer's state has eight bits (`optimizer.offload=True` would keep it in
pinned host memory instead). `export/` holds the dequantised weights that were trained against, with the adapter merged
in. On a small model, whose weights four bits round coarsely, `--config.method.init=loftq` begins with factors that make
up for part of the rounding (arXiv:2310.08659). On accelerators add
`--config.model.param_dtype=bfloat16 --config.model.compute_dtype=bfloat16`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.model = ConfigDict({'path': 'runs/quickstart/pretrain'})
    config.method = ConfigDict({'name': 'qlora', 'rank': 16, 'alpha': 32.0, 'targets': 'all-linear'})
    config.data = ConfigDict({'train': 'runs/quickstart/prepare', 'seq_len': 512})
    config.train = ConfigDict({'steps': 200, 'batch_size': 16})
    config.optimizer = ConfigDict(
        {'name': 'adamw8bit', 'lr': 2e-4, 'warmup_steps': 20, 'schedule': 'cosine', 'weight_decay': 0.0}
    )
    config.eval = ConfigDict({'every': 50, 'batches': 20, 'patience': 3})
    return config
