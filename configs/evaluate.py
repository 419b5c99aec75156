"""Score a model on held-out text: loss, perplexity, accuracy, bits a byte.

    python -m jaxtune.main --config configs/evaluate.py \
        --config.model.path=WORKDIR_OR_FOLDER --config.data.eval=eval.jsonl
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'evaluate'
    config.data = ConfigDict({'seq_len': 512})
    return config
