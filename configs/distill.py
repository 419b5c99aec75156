"""Let a small model learn what a larger one says of every token (distillation: forward, reverse KL, generalised JSD).

    python -m jaxtune.main --config configs/distill.py \
        --config.distill.teacher=LARGE_FOLDER_OR_WORKDIR --config.model.path=SMALL_FOLDER_OR_WORKDIR \
        --config.data.train=train.jsonl --config.data.eval=eval.jsonl

The teacher is frozen and asked in every step; it has the student's tokenizer, and may be of another family, width and
depth. Texts are learnt whole, of conversations what the assistant writes. `distill.beta` is 0 for forward KL, 1 for
reverse KL, between them the generalised Jensen-Shannon divergence of GKD; `distill.weight` is the divergence's share of
the loss beside the data's own, 1 = the teacher alone. `eval/loss` is the data's, as `causal_lm` and `sft` have it. Add
`--config.method.name=lora` to tune an adapter of the student; `data.format`, `data.template` as for `configs/sft.py`.

From scratch, a student of half the quickstart's width (1.43 million parameters, the teacher 4.68), after the stages
`prepare` and `pretrain` of `configs/quickstart.py`:

    python -m jaxtune.main --config configs/distill.py \
        --config.distill.teacher=runs/quickstart/pretrain --config.tokenizer.path=runs/quickstart/prepare \
        --config.data.train=runs/quickstart/prepare --config.data.eval=runs/quickstart/prepare \
        --config.model.config.model_type=llama --config.model.config.hidden_size=128 \
        --config.model.config.intermediate_size=344 --config.model.config.num_hidden_layers=5 \
        --config.model.config.num_attention_heads=4 --config.model.config.num_key_value_heads=2 \
        --config.model.config.max_position_embeddings=1024 --config.model.config.tie_word_embeddings=True \
        --config.train.steps=80 --config.optimizer.name=muon --config.optimizer.lr=4e-3 --config.optimizer.b1=0.9 \
        --config.optimizer.weight_decay=0.1 --config.optimizer.warmup_steps=15

Seen after these 80 updates (328,000 tokens): a held-out loss of 5.415 nats a token, of the same student on the data
alone (`--config.objective=causal_lm`) 5.601; the teacher, of 120 updates, has 4.890. The updates took 13 and 6 minutes
on two cores that other work kept busy, unevenly.

The recipe's rate suits small models; take 1e-5 to 5e-5 for published ones, and on an accelerator add
`--config.model.compute_dtype=bfloat16`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.objective = 'distill'
    config.data = ConfigDict({'seq_len': 256})
    config.train = ConfigDict({'epochs': 1.0, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-3, 'warmup_steps': 20, 'schedule': 'cosine', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 100})
    return config
