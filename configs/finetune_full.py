"""Go on training every weight of your own model on your own text.

    python -m jaxtune.main --config configs/finetune_full.py \
        --config.model.path=MODEL_FOLDER_OR_HUB_ID --config.data.train=train.jsonl --config.data.eval=eval.jsonl

Stops after three evaluations without a better held-out loss and exports the best weights. Small learning rate, since
pretrained weights are easily spoilt; a head that the folder lacks learns at `optimizer.new_lr`. On accelerators add
`--config.model.compute_dtype=bfloat16`, and `--config.mesh.fsdp=-1 --config.mesh.data=1` to divide the weights.

What a weight costs, beside activations: 16 bytes (itself, its gradient and AdamW's two moments, all float32). With
`model.param_dtype=bfloat16` 12 to 14, the more where `train.accumulate` adds gradients up in float32: updates are then
rounded stochastically, so that small ones count on average; norms, biases and moments stay float32. From scratch,
300 updates of the quickstart's model ended within 1 % of float32's held-out loss. `optimizer.name=adamw8bit` takes 6
bytes off either; `optimizer.offload=True` keeps the moments in the host's memory, and waits for them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = 'train'
    config.data = ConfigDict({'seq_len': 512})
    config.train = ConfigDict({'epochs': 3.0, 'batch_size': 16})
    config.optimizer = ConfigDict({'lr': 2e-5, 'new_lr': 1e-4, 'warmup_steps': 50, 'schedule': 'cosine'})
    config.eval = ConfigDict({'every': 100, 'patience': 3})
    return config
