"""Chinese text -> a training set: the rules of the `zh` preset, words by character, a vocabulary of its own.

    python -m jaxtune.main --config configs/prepare_chinese.py --config.data.sources.zh.path='data/*_zh.*'

Needs `pip install 'jaxtune[data]'`. Tried on two cores with 5 MiB (two novels, 4,002 poems): 20 s; 99.5 % of the
documents stay, 1.14 million tokens, 4.5 bytes a token.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'prepare'
    config.data = ConfigDict({'vocab_size': 16384, 'eval_fraction': 0.01})
    config.data.sources = ConfigDict({'zh': {'path': 'data/zh', 'preset': 'zh', 'language': 'zh'}})
    config.data.steps = ConfigDict(
        {'clean': {'encoding': True, 'unicode': True, 'markup': True}, 'dedup': {'near': 0.8}}
    )
    return config
