"""What a step of an 8-billion-parameter Llama needs on hardware that is not here.

    python -m jaxtune.main --config configs/compile_causal_lm.py --config.compile.topology=v5e:4x4
    python -m jaxtune.main --config configs/compile_causal_lm.py --config.compile.topology=cuda:h200x1

Compiles the training step ahead of time and reports whether it fits, its memory and its collectives. A TPU topology
needs `pip install 'jaxtune[tpu]'`, a CUDA card `pip install 'jaxtune[cuda]'`; neither needs the hardware. Seen for
v5e:4x4: 10.4 GiB of 15.75 GiB a chip, of which the weights in bfloat16 and their two moments in float32 are 4.7 GiB,
and 1.89 s an update by the estimate, 53 % of the chips' peak.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'compile'
    config.compile = ConfigDict({'topology': 'v5e:4x4'})
    config.model = ConfigDict({'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': 'full'})
    config.model.config = ConfigDict(
        {
            'model_type': 'llama',
            'vocab_size': 128256,
            'hidden_size': 4096,
            'intermediate_size': 14336,
            'num_hidden_layers': 32,
            'num_attention_heads': 32,
            'num_key_value_heads': 8,
            'max_position_embeddings': 8192,
        }
    )
    config.data = ConfigDict({'seq_len': 4096})
    config.train = ConfigDict({'batch_size': 16})
    config.mesh = ConfigDict({'data': 1, 'fsdp': -1})
    return config
