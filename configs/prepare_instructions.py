"""Questions and answers from the running Python's own documentation, real instruction data on every machine.

    python -m jaxtune.main --config configs/prepare_instructions.py
    python -m jaxtune.main --config configs/prepare_instructions.py --config.data.format=preference

`train.jsonl` and `eval.jsonl` in the workdir are records of `data.format`: `alpaca`, `messages`, `sharegpt`, `prompt`
or `preference` (the right answer beside one about something else). Your own files of such records go the same way:
name them as `data.train`. Needs `pip install 'jaxtune[data]'`. Tried on two busy cores: 24 s, 6,048 records.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'prepare'
    config.data = ConfigDict({'train': 'python-stdlib', 'format': 'messages', 'eval_fraction': 0.05})
    return config
