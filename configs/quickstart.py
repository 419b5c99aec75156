"""From nothing to a language model on a laptop: prepare -> pretrain -> sample.

    python -m jaxtune.main --config configs/quickstart.py

Reads the running Python's own library (real text on every machine), trains a tokenizer and a Llama of 5 million
parameters from scratch, and lets it continue held-out texts.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('prepare', 'pretrain', 'sample')

    config.prepare = ConfigDict()
    config.prepare.task = 'prepare'
    config.prepare.data = ConfigDict({'train': 'python-stdlib', 'vocab_size': 4096, 'eval_fraction': 0.05})

    config.pretrain = ConfigDict()
    config.pretrain.task = 'train'
    config.pretrain.tokenizer = ConfigDict({'path': '@prepare'})
    config.pretrain.model = ConfigDict()
    config.pretrain.model.config = ConfigDict(
        {
            'model_type': 'llama',
            'hidden_size': 256,
            'intermediate_size': 688,
            'num_hidden_layers': 5,
            'num_attention_heads': 4,
            'num_key_value_heads': 2,
            'max_position_embeddings': 1024,
            'tie_word_embeddings': True,
        }
    )
    config.pretrain.data = ConfigDict({'train': '@prepare', 'eval': '@prepare', 'seq_len': 256})
    config.pretrain.train = ConfigDict({'steps': 300, 'batch_size': 16})
    config.pretrain.optimizer = ConfigDict(
        {'name': 'adamw', 'lr': 4e-3, 'b2': 0.95, 'weight_decay': 0.1, 'warmup_steps': 30, 'schedule': 'cosine'}
    )
    config.pretrain.eval = ConfigDict({'every': 100})

    config.sample = ConfigDict()
    config.sample.task = 'generate'
    config.sample.model = ConfigDict({'path': '@pretrain'})
    config.sample.data = ConfigDict({'eval': '@prepare'})
    config.sample.generate = ConfigDict(
        {'prompts': 8, 'prompt_tokens': 32, 'max_new_tokens': 96, 'temperature': 0.8, 'top_p': 0.95}
    )
    return config
