"""A small mixture of experts from scratch, beside a dense model of as much work a token: prepare -> dense -> mixture.

    python -m jaxtune.main --config configs/pretrain_moe.py [--config.prepare.data.train='corpus/*.jsonl']

Reads the running Python's own library and trains two models of 4 layers on it, one (2.1 million parameters) with a
feed-forward layer 384 wide, one with 8 experts 192 wide of which each token goes to 2. Seen after 200 updates (0.8
million tokens, 0.28 of an epoch): held-out losses of 4.280 and 4.276 nats a token, so that early the two are level;
`--config.dense.train.steps=` and `--config.mixture.train.steps=` train them for longer. That took 18 and 9 minutes on
two cores that other work kept busy; the dense model's first updates, while there was less of it, 1.5 seconds each.

`report.html` of the mixture has the load of the busiest expert (from 3.6 to 2.0 times an even share, in the layer where
that is most) and the entropy of the loads. The load-balancing loss is that of `transformers`, of all layers together.
"""

from ml_collections import ConfigDict

STEPS = 200


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('prepare', 'dense', 'mixture')

    config.prepare = ConfigDict()
    config.prepare.task = 'prepare'
    config.prepare.data = ConfigDict({'train': 'python-stdlib', 'vocab_size': 4096, 'eval_fraction': 0.05})

    config.dense = pretrain({'model_type': 'qwen3', 'intermediate_size': 384})
    config.mixture = pretrain(
        {
            'model_type': 'qwen3_moe',
            'num_experts': 8,
            'num_experts_per_tok': 2,
            'moe_intermediate_size': 192,
            'norm_topk_prob': True,
        }
    )
    config.mixture.moe = ConfigDict({'aux_loss': 0.01, 'z_loss': 0.001})
    return config


def pretrain(fields: dict) -> ConfigDict:
    """A stage that trains a model of these fields; 2 of 8 experts of width 192 are 384 wide together."""
    stage = ConfigDict()
    stage.task = 'train'
    stage.tokenizer = ConfigDict({'path': '@prepare'})
    stage.model = ConfigDict()
    stage.model.config = ConfigDict(
        {
            **fields,
            'hidden_size': 192,
            'num_hidden_layers': 4,
            'num_attention_heads': 3,
            'num_key_value_heads': 1,
            'head_dim': 64,
            'max_position_embeddings': 1024,
            'tie_word_embeddings': True,
        }
    )
    stage.data = ConfigDict({'train': '@prepare', 'eval': '@prepare', 'seq_len': 256})
    stage.train = ConfigDict({'steps': STEPS, 'batch_size': 16})
    stage.optimizer = ConfigDict(
        {'name': 'muon', 'lr': 4e-3, 'b1': 0.9, 'weight_decay': 0.1, 'warmup_steps': 15, 'schedule': 'cosine'}
    )
    stage.eval = ConfigDict({'every': 100})
    return stage
