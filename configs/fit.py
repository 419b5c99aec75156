"""What fits where, and how fast: a table of hardware by tuning methods by lengths, without any of the hardware.

    python -m jaxtune.main --config configs/fit.py --config.model.path=MODEL --config.compile.topology=v5e-4,h100x8

MODEL is a folder with a `config.json`, weights or none. Every cell's training step is compiled ahead of time; what does
not fit comes with the nearest settings that do, compiled too. A TPU topology needs `pip install 'jaxtune[tpu]'`, a GPU
`pip install 'jaxtune[cuda]'`. Shorter: `jaxtune fit MODEL --on v5e-4,h100x8`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'compile'
    config.compile = ConfigDict({'topology': 'v5e-4,h100x8', 'methods': 'full,lora,qlora', 'rows_per_device': 1})
    config.model = ConfigDict({'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': 'full'})
    config.data = ConfigDict({'seq_len': 4096})
    config.mesh = ConfigDict({'data': 1, 'fsdp': -1})
    return config
