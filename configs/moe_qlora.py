"""QLoRA of a mixture of experts: what tuning Qwen3-30B-A3B needs on one card, compiled without having it.

    python -m jaxtune.main --config configs/moe_qlora.py
    python -m jaxtune.main --config configs/moe_qlora.py --config.compile.topology=v5p:2x2x1 --config.mesh.data=1 \
        --config.mesh.fsdp=4 --config.train.batch_size=4

Qwen3-30B-A3B's shapes, rank 16 on all linear layers, of each of the 128 experts too, sequences of 4,096, one a device.
Seen: 30.1 GiB for an H200 and 19.3 GiB for each chip of v5p:2x2x1, of which weights and state are 20.3 and 5.1 GiB.
With `--config.method.share_experts=True` all experts of a layer share one pair of factors.

All weights at once, on a slice whose chips divide the experts by eight and each of them by eight (16.5 GiB a chip):

    python -m jaxtune.main --config configs/moe_qlora.py --config.compile.topology=v5p:4x4x4 \
        --config.method.name=full --config.optimizer.name=adamw --config.optimizer.lr=1e-5 --config.mesh.data=1 \
        --config.mesh.fsdp=8 --config.mesh.expert=8 --config.train.batch_size=64

A TPU topology needs `pip install 'jaxtune[tpu]'`, a CUDA card `'jaxtune[cuda]'`. To train it, set `task=train`,
`model.path`, `train.steps`, `data.train` and `data.eval`; another mixture is tuned with `configs/qlora.py`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'compile'
    config.compile = ConfigDict({'topology': 'cuda:h200x1'})
    config.model = ConfigDict({'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': 'full'})
    config.model.config = ConfigDict(
        {
            'model_type': 'qwen3_moe',
            'vocab_size': 151936,
            'hidden_size': 2048,
            'intermediate_size': 6144,
            'moe_intermediate_size': 768,
            'num_hidden_layers': 48,
            'num_attention_heads': 32,
            'num_key_value_heads': 4,
            'head_dim': 128,
            'num_experts': 128,
            'num_experts_per_tok': 8,
            'norm_topk_prob': True,
            'max_position_embeddings': 40960,
            'rope_theta': 1e6,
            'rms_norm_eps': 1e-6,
            'tie_word_embeddings': False,
        }
    )
    config.method = ConfigDict({'name': 'qlora', 'rank': 16, 'alpha': 32.0})
    config.data = ConfigDict({'seq_len': 4096})
    config.train = ConfigDict({'batch_size': 1})
    config.moe = ConfigDict({'aux_loss': 0.001})
    config.optimizer = ConfigDict(
        {'name': 'adamw8bit', 'lr': 2e-4, 'schedule': 'cosine', 'weight_decay': 0.0, 'clip_norm': 0.3}
    )
    return config
