"""Let a model continue your prompts.

    python -m jaxtune.main --config configs/generate.py \
        --config.model.path=WORKDIR_OR_FOLDER --config.data.eval=prompts.jsonl --config.data.format=prompt

`prompts.jsonl` holds `{"prompt": "..."}` a line; a text file is one prompt (without `data.format=prompt`, records hold
`{"text": "..."}`). Completions land in `samples.jsonl`. `--config.generate.temperature=0` takes the likeliest token.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'generate'
    config.generate = ConfigDict({'max_new_tokens': 128, 'temperature': 0.8, 'top_p': 0.95})
    return config
