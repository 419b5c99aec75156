"""Teach an encoder-decoder to turn one text into another: translation, splitting sentences, summaries.

    python -m jaxtune.main --config configs/finetune_seq2seq.py --config.finetune.model.path=MODEL_FOLDER_OR_WORKDIR \
        --config.data.train=train.jsonl --config.data.eval=eval.jsonl

Records hold `{"source": "...", "target": "..."}`; `data.source_key` and `data.target_key` name other fields, and
`--config.seq2seq.prefix='translate English to Chinese: '` goes before every source. The second stage writes what the
model makes of the held-out sources, by beam search, to `write/samples.jsonl`. The model is any T5, mT5 or umT5 in
Hugging Face's format, or what `configs/pretrain_seq2seq.py` leaves in `runs/pretrain_seq2seq/pretrain`. On accelerators
add `--config.model.compute_dtype=bfloat16`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('finetune', 'write')

    finetune = config.finetune = ConfigDict()
    finetune.task = 'train'
    finetune.objective = 'seq2seq'
    finetune.data = ConfigDict({'format': 'pair', 'seq_len': 128, 'target_len': 128})
    finetune.train = ConfigDict({'epochs': 3.0, 'batch_size': 32})
    finetune.optimizer = ConfigDict({'lr': 1e-3, 'weight_decay': 0.0, 'warmup_steps': 100, 'schedule': 'linear'})
    finetune.eval = ConfigDict({'every': 200, 'patience': 3})

    write = config.write = ConfigDict()
    write.task = 'generate'
    write.model = ConfigDict({'path': '@finetune'})
    write.data = ConfigDict({'format': 'pair'})
    write.generate = ConfigDict({'temperature': 0.0, 'beams': 4, 'max_new_tokens': 128, 'batch_size': 16})
    return config
