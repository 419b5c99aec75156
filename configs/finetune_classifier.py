"""Teach an encoder to tell texts (or pairs of texts) apart.

    python -m jaxtune.main --config configs/finetune_classifier.py \
        --config.model.path=MODEL_FOLDER_OR_HUB_ID --config.data.train=train.jsonl --config.data.eval=eval.jsonl

Records are `{"text": …, "label": …}` or `{"text1": …, "text2": …, "label": …}`; labels are names or integers. The model
is a BERT, RoBERTa, DistilBERT or ModernBERT: a folder, a hub id, or a workdir. The classifier, which its folder lacks,
learns at `optimizer.new_lr`. The best weights by held-out accuracy are exported, with the labels' names.

Rates are those of published models; on an accelerator add `--config.model.compute_dtype=bfloat16`, and
`--config.mesh.fsdp=-1 --config.mesh.data=1` to divide the weights over several. The small model of
`configs/pretrain_masked_lm.py` takes minutes on two CPU cores and learns faster:

    --config.model.path=runs/pretrain_masked_lm/pretrain --config.optimizer.lr=1e-3 --config.optimizer.new_lr=2e-3
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.objective = 'classification'
    config.data = ConfigDict({'seq_len': 64})
    config.train = ConfigDict({'epochs': 5.0, 'batch_size': 32})
    config.optimizer = ConfigDict({'lr': 5e-5, 'new_lr': 1e-3, 'warmup_steps': 50, 'schedule': 'linear'})
    config.eval = ConfigDict({'every': 100, 'patience': 5, 'metric': 'eval/accuracy'})
    return config
