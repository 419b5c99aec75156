"""From nothing to a model that answers, on a laptop: prepare -> pretrain -> sft -> reward -> ppo -> sample.

    python -m jaxtune.main --config configs/quickstart.py

Reads the running Python's own library (real text on every machine), trains a tokenizer and a Llama of 5 million
parameters from scratch, teaches it to say what a function does, trains a reward model that tells a sentence from its
shuffled words, lets the tuned model learn from that reward, and answer for held-out functions.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('prepare', 'pretrain', 'sft', 'reward', 'ppo', 'sample')

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
    config.pretrain.train = ConfigDict({'steps': 120, 'batch_size': 16})
    config.pretrain.optimizer = ConfigDict(
        {'name': 'muon', 'lr': 4e-3, 'b1': 0.9, 'weight_decay': 0.1, 'warmup_steps': 15, 'schedule': 'cosine'}
    )
    config.pretrain.eval = ConfigDict({'every': 60})

    config.sft = ConfigDict()
    config.sft.task = 'train'
    config.sft.objective = 'sft'
    config.sft.model = ConfigDict({'path': '@pretrain'})
    config.sft.data = ConfigDict({'train': 'python-stdlib', 'eval': 'python-stdlib', 'seq_len': 256})
    config.sft.train = ConfigDict({'steps': 24, 'batch_size': 16})
    config.sft.optimizer = ConfigDict({'lr': 1e-3, 'warmup_steps': 5, 'weight_decay': 0.0})
    config.sft.eval = ConfigDict({'samples': 4})
    config.sft.generate = ConfigDict({'max_new_tokens': 48})

    config.reward = ConfigDict()
    config.reward.task = 'train'
    config.reward.objective = 'reward'
    config.reward.model = ConfigDict({'path': '@pretrain'})
    config.reward.data = ConfigDict({'train': 'python-stdlib', 'eval': 'python-stdlib', 'seq_len': 64})
    config.reward.train = ConfigDict({'steps': 80, 'batch_size': 24})
    config.reward.optimizer = ConfigDict({'lr': 5e-4, 'new_lr': 2e-3, 'warmup_steps': 5, 'weight_decay': 0.0})
    config.reward.eval = ConfigDict({'metric': 'eval/accuracy'})

    config.ppo = ConfigDict()
    config.ppo.task = 'ppo'
    config.ppo.model = ConfigDict({'path': '@sft'})
    config.ppo.data = ConfigDict(
        {'train': 'python-stdlib', 'eval': 'python-stdlib', 'format': 'alpaca', 'seq_len': 256}
    )
    config.ppo.generate = ConfigDict({'max_new_tokens': 32, 'batch_size': 32, 'prompts': 32})
    config.ppo.rl = ConfigDict({'reward': '@reward', 'rollouts': 32, 'epochs': 1})
    config.ppo.train = ConfigDict({'steps': 10, 'batch_size': 16})
    config.ppo.optimizer = ConfigDict({'lr': 1e-4, 'new_lr': 1e-3, 'schedule': 'constant', 'weight_decay': 0.0})
    config.ppo.log = ConfigDict({'every': 1})

    config.sample = ConfigDict()
    config.sample.task = 'generate'
    config.sample.model = ConfigDict({'path': '@ppo'})
    config.sample.data = ConfigDict({'eval': 'python-stdlib', 'format': 'alpaca'})
    config.sample.generate = ConfigDict({'prompts': 8, 'max_new_tokens': 48, 'temperature': 0.7, 'top_p': 0.95})
    return config
