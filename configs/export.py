"""Export a model: a Hugging Face folder with an adapter merged, and beside its weights llama.cpp's `model.gguf`.

    python -m jaxtune.main --config configs/export.py --config.model.path=WORKDIR_OR_FOLDER \
        [--config.export.format=gguf --config.export.quantise=q4_k --config.data.eval=eval.jsonl]

With `data.eval` the last lines give the held-out loss of the weights and of the file. Q4_K takes 0.08 s of a core for a
million weights.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'export'
    config.data = ConfigDict({'seq_len': 512})
    return config
