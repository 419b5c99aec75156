"""Let a model prefer the better of two answers, without a reward model (DPO; IPO, hinge, KTO, ORPO, SimPO).

    python -m jaxtune.main --config configs/dpo.py \
        --config.model.path=MODEL_FOLDER_OR_WORKDIR --config.data.train=train.jsonl --config.data.eval=eval.jsonl

Records are those of `configs/reward_model.py`. `dpo.loss` chooses the loss (`ipo`, `hinge`, …), `dpo.beta` the strength
of the KL penalty to the reference, which is the model handed in, or `dpo.reference`. Its log-probabilities are computed
once, before training; the first loss is ln 2. KTO also reads single answers with a `label`.

The rate suits small models; take 5e-7 to 5e-6 for published ones, and on an accelerator add
`--config.model.compute_dtype=bfloat16`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.objective = 'dpo'
    config.data = ConfigDict({'seq_len': 256})
    config.train = ConfigDict({'epochs': 1.0, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 1e-4, 'warmup_steps': 20, 'schedule': 'linear', 'weight_decay': 0.0})
    config.eval = ConfigDict({'every': 100})
    return config
