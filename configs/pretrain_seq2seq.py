"""A small T5 from scratch by span corruption: prepare -> pretrain.

    python -m jaxtune.main --config configs/pretrain_seq2seq.py

Reads the running Python's own library, trains a tokenizer, and hides 15 % of each row's tokens in spans of 3 that the
decoder writes (T5's objective; `--config.pretrain.span_corruption.mode=ul2` mixes seven denoisers instead). The size
here is for a laptop without an accelerator. Rows are short and the optimizer is Muon so that so small a model leaves
the level of single words' frequencies soon: held-out loss 3.84 after 1,200 updates (AdamW on rows of 128 was at 4.87
after 900), where the tokens' frequencies alone give 6.67. For accelerators, T5 1.1's base model has `d_model` 768,
`d_ff` 2048, `num_layers` 12, `num_heads` 12 and `d_kv` 64 (`--config.pretrain.model.config.KEY=...`); give it rows of
512 tokens (`--config.pretrain.data.seq_len`), batches of 128 rows or more,
`--config.pretrain.model.compute_dtype=bfloat16` and a corpus of your own (`--config.prepare.data.train`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('prepare', 'pretrain')

    config.prepare = ConfigDict()
    config.prepare.task = 'prepare'
    config.prepare.data = ConfigDict({'train': 'python-stdlib', 'vocab_size': 4096, 'eval_fraction': 0.05})

    pretrain = config.pretrain = ConfigDict()
    pretrain.task = 'train'
    pretrain.objective = 'span_corruption'
    pretrain.tokenizer = ConfigDict({'path': '@prepare'})
    pretrain.model = ConfigDict()
    pretrain.model.config = ConfigDict(
        {
            'model_type': 't5',
            'd_model': 192,
            'd_kv': 48,
            'd_ff': 512,
            'num_layers': 3,
            'num_heads': 4,
            'feed_forward_proj': 'gated-gelu',
            'tie_word_embeddings': False,
        }
    )
    pretrain.data = ConfigDict({'train': '@prepare', 'eval': '@prepare', 'seq_len': 48})
    pretrain.train = ConfigDict({'steps': 1200, 'batch_size': 64})
    pretrain.optimizer = ConfigDict(
        {
            'name': 'muon',
            'lr': 2e-3,
            'b1': 0.9,
            'b2': 0.98,
            'weight_decay': 0.1,
            'warmup_steps': 60,
            'schedule': 'cosine',
        }
    )
    pretrain.eval = ConfigDict({'every': 300, 'batches': 20})
    return config
