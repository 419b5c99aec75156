"""The QLoRA headline: what tuning a LLaMA of 65 billion parameters needs on one chip, compiled without having it.

    python -m jaxtune.main --config configs/qlora_65b.py
    python -m jaxtune.main --config configs/qlora_65b.py --config.compile.topology=cuda:a100-80gx1

LLaMA-65B's shapes, rank 64 on all linear layers, sequences of 512, one at a time, 8-bit optimizer state (the paper:
under 48 GB, arXiv:2305.14314). Seen: 46.7 GB for v5p:1x1x1, 47.3 GB for an A100, 47.4 GB for an H200, of which weights
and state are 39.3 GB; with the shapes of LLaMA-7B and sequences of 1,024: 7.2 GB and 7.3 GB. The TPU's were seen with
libtpu 0.0.42.1; 0.0.52 needs 45.2 GB and 6.5 GB. A TPU topology needs `pip install 'jaxtune[tpu]'`, a CUDA card
`'jaxtune[cuda]'`. To train one, set `task=train`, `model.path`, `data.train` and `data.eval`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'compile'
    config.compile = ConfigDict({'topology': 'v5p:1x1x1'})
    config.model = ConfigDict({'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': 'full'})
    config.model.config = ConfigDict(
        {
            'model_type': 'llama',
            'vocab_size': 32000,
            'hidden_size': 8192,
            'intermediate_size': 22016,
            'num_hidden_layers': 80,
            'num_attention_heads': 64,
            'max_position_embeddings': 2048,
            'rms_norm_eps': 1e-5,
        }
    )
    config.method = ConfigDict({'name': 'qlora', 'rank': 64, 'alpha': 16.0})
    config.data = ConfigDict({'seq_len': 512})
    config.train = ConfigDict({'batch_size': 1})
    config.optimizer = ConfigDict(
        {'name': 'adamw8bit', 'lr': 1e-4, 'schedule': 'constant', 'weight_decay': 0.0, 'clip_norm': 0.3}
    )
    return config
