"""GPT-2's small model (124 million parameters) from scratch on your text.

    python -m jaxtune.main --config configs/pretrain_causal_lm.py --config.prepare.data.train='corpus/*.jsonl'

For eight accelerator chips: 0.5 million tokens an update, 10 billion tokens in 19,073 updates, with the shape and the
schedule of GPT-3's small model (Brown et al. 2020, arXiv:2005.14165, table 2.1). One stage makes the tokenizer and the
token files, the next one trains. Not yet run to its end on hardware; `configs/compile_causal_lm.py` says what a step
needs there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('prepare', 'pretrain')

    config.prepare = ConfigDict()
    config.prepare.task = 'prepare'
    config.prepare.data = ConfigDict({'train': 'python-stdlib', 'vocab_size': 32768, 'eval_fraction': 0.01})

    pretrain = config.pretrain = ConfigDict()
    pretrain.task = 'train'
    pretrain.tokenizer = ConfigDict({'path': '@prepare'})
    pretrain.model = ConfigDict({'compute_dtype': 'bfloat16'})
    pretrain.model.config = ConfigDict({'model_type': 'gpt2', 'n_embd': 768, 'n_layer': 12, 'n_head': 12})
    pretrain.data = ConfigDict({'train': '@prepare', 'eval': '@prepare', 'seq_len': 1024})
    pretrain.train = ConfigDict({'steps': 19_073, 'batch_size': 512})
    pretrain.optimizer = ConfigDict(
        {'lr': 6e-4, 'b2': 0.95, 'weight_decay': 0.1, 'warmup_steps': 715, 'schedule': 'cosine'}
    )
    pretrain.eval = ConfigDict({'every': 500, 'batches': 64})
    pretrain.checkpoint = ConfigDict({'every': 500})
    pretrain.mesh = ConfigDict({'data': 1, 'fsdp': -1})
    return config
