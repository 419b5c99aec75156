"""LoRA beside gpt-oss-20b: what tuning it needs on one card of 80 GB, compiled without having it.

    python -m jaxtune.main --config configs/gpt_oss_lora.py

Rank 16 on all linear layers, of each expert too, beside weights in bfloat16 (a folder's MXFP4 is widened while it is
read), sequences of 4,096, one at a time. Seen: 46.1 GiB for an H100, of which weights and state are 40 GiB. Needs
`pip install 'jaxtune[cuda]'`. To train it, set `task=train`, `model.path`, `train.steps`, `data.train` and `data.eval`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'compile'
    config.compile = ConfigDict({'topology': 'cuda:h100x1'})
    config.model = ConfigDict({'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': 'full'})
    config.model.config = ConfigDict(
        {
            'model_type': 'gpt_oss',
            'vocab_size': 201088,
            'hidden_size': 2880,
            'intermediate_size': 2880,
            'num_hidden_layers': 24,
            'num_attention_heads': 64,
            'num_key_value_heads': 8,
            'head_dim': 64,
            'num_local_experts': 32,
            'num_experts_per_tok': 4,
            'sliding_window': 128,
            'max_position_embeddings': 131072,
            'tie_word_embeddings': False,
        }
    )
    config.method = ConfigDict({'name': 'lora', 'rank': 16, 'alpha': 32.0})
    config.data = ConfigDict({'seq_len': 4096})
    config.train = ConfigDict({'batch_size': 1})
    config.optimizer = ConfigDict({'name': 'adamw8bit', 'lr': 2e-4, 'schedule': 'cosine', 'weight_decay': 0.0})
    return config
