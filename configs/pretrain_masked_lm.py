"""A BERT from scratch on your text: prepare -> pretrain.

    python -m jaxtune.main --config configs/pretrain_masked_lm.py [--config.prepare.data.train='corpus/*.jsonl']

As it stands it reads the running Python's own library and trains a BERT of 2 million parameters with dynamic masks
(15 % of the tokens; 80 % of those hidden, 10 % replaced, 10 % kept), sized for ten minutes on two CPU cores.
`eval/accuracy` is the share of the chosen tokens that it predicts: 31.9 % after 3 million tokens, where always guessing
the commonest gets 2.5 % right. With so few tokens the rows are short and the optimizer is Muon: a BERT first has to
find out which position is whose neighbour, and on rows of 128 (AdamW 12.6 %, Muon 12.9 %) it does not get that far.

With a tokenizer that closes each text itself, such as BERT's, add `--config.prepare.data.append_eos=False` and
`--config.pretrain.data.append_eos=False`.

BERT's own size and schedule (Devlin et al. 2018, arXiv:1810.04805: 110 million parameters, a million updates of 0.13
million tokens), for eight accelerator chips; not yet run to its end on hardware:

    --config.pretrain.model.config.hidden_size=768 --config.pretrain.model.config.num_hidden_layers=12 \
    --config.pretrain.model.config.num_attention_heads=12 --config.pretrain.model.config.intermediate_size=3072 \
    --config.pretrain.model.config.max_position_embeddings=512 --config.pretrain.model.config.initializer_range=0.02 \
    --config.pretrain.model.compute_dtype=bfloat16 \
    --config.prepare.data.vocab_size=32768 --config.pretrain.data.seq_len=512 --config.pretrain.train.batch_size=256 \
    --config.pretrain.train.steps=1000000 --config.pretrain.optimizer.name=adamw --config.pretrain.optimizer.lr=1e-4 \
    --config.pretrain.optimizer.warmup_steps=10000 --config.pretrain.mesh.fsdp=-1 --config.pretrain.mesh.data=1
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.stages = ('prepare', 'pretrain')

    config.prepare = ConfigDict()
    config.prepare.task = 'prepare'
    config.prepare.data = ConfigDict({'train': 'python-stdlib', 'vocab_size': 2048, 'eval_fraction': 0.05})

    pretrain = config.pretrain = ConfigDict()
    pretrain.task = 'train'
    pretrain.objective = 'masked_lm'
    pretrain.masked_lm = ConfigDict({'probability': 0.15, 'whole_word': False})
    pretrain.tokenizer = ConfigDict({'path': '@prepare'})
    pretrain.model = ConfigDict()
    pretrain.model.config = ConfigDict(
        {
            'model_type': 'bert',
            'hidden_size': 192,
            'intermediate_size': 768,
            'num_hidden_layers': 3,
            'num_attention_heads': 4,
            'max_position_embeddings': 256,
            'initializer_range': 0.05,
        }
    )
    pretrain.data = ConfigDict({'train': '@prepare', 'eval': '@prepare', 'seq_len': 32})
    pretrain.train = ConfigDict({'steps': 1500, 'batch_size': 64})
    pretrain.optimizer = ConfigDict(
        {
            'name': 'muon',
            'lr': 2e-3,
            'b1': 0.9,
            'b2': 0.98,
            'weight_decay': 0.01,
            'warmup_steps': 100,
            'schedule': 'linear',
        }
    )
    pretrain.eval = ConfigDict({'every': 500, 'metric': 'eval/accuracy', 'batches': 64})
    return config
