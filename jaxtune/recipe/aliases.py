"""The nearest valid key of a misspelt one."""

import difflib

from jaxtune.config import SCHEMA

# Other programs' names of a key, and names of groups that stand for their first key.
_NAMES = {
    'checkpoint.every': ('save_steps',),
    'checkpoint.keep': ('save_total_limit',),
    'data.eval': ('eval_dataset', 'eval_file', 'validation_file'),
    'data.eval_fraction': ('val_set_size',),
    'data.seq_len': ('cutoff_len', 'max_length', 'max_seq_len', 'max_seq_length', 'seq_length', 'sequence_len'),
    'data.template': ('chat_template',),
    'data.train': ('data', 'dataset', 'dataset_path', 'train_dataset', 'train_file'),
    'dpo.beta': ('beta',),
    'eval.batch_size': ('per_device_eval_batch_size',),
    'eval.every': ('eval_steps',),
    'generate.max_new_tokens': ('max_tokens',),
    'log.every': ('logging_steps',),
    'method.alpha': ('lora_alpha',),
    'method.dropout': ('lora_dropout',),
    'method.name': ('method',),
    'method.path': ('adapter', 'adapter_path'),
    'method.rank': ('lora_r', 'lora_rank', 'r'),
    'method.targets': ('lora_target', 'target_modules'),
    'model.compute_dtype': ('bf16', 'dtype', 'torch_dtype'),
    'model.path': ('model', 'model_id', 'model_name', 'model_name_or_path'),
    'model.remat': ('gradient_checkpointing',),
    'optimizer.clip_norm': ('grad_clip', 'max_grad_norm'),
    'optimizer.lr': ('learning_rate', 'lr'),
    'optimizer.name': ('optim', 'optimizer'),
    'optimizer.schedule': ('lr_scheduler', 'lr_scheduler_type'),
    'rl.advantage': ('advantage_estimator', 'adv_estimator'),
    'rl.clip': ('cliprange', 'epsilon'),
    'rl.clip_high': ('epsilon_high',),
    'rl.dual_clip': ('clip_ratio_c', 'delta'),
    'rl.group': ('num_generations',),
    'rl.normalise': ('loss_agg_mode', 'loss_type', 'normalize'),
    'rl.overlong': ('mask_truncated_completions',),
    'rl.ratio': ('importance_sampling_level',),
    'rl.reward': ('reward_funcs', 'reward_function'),
    'sft.neftune_alpha': ('neftune_noise_alpha',),
    'tokenizer.path': ('tokenizer', 'tokenizer_name'),
    'train.accumulate': ('gradient_accumulation', 'gradient_accumulation_steps'),
    'train.batch_size': ('batch_size', 'per_device_train_batch_size'),
    'train.epochs': ('epochs', 'num_epochs', 'num_train_epochs'),
    'train.steps': ('iterations', 'max_steps', 'num_steps', 'steps'),
}
_ALIASES = {name: key for key, names in _NAMES.items() for name in names}


def nearest(name: str) -> str:
    """The nearest valid key, '' if none is close: by names of other programs, by the whole path, by the last part."""
    last = name.rsplit('.', 1)[-1].replace('-', '_').lower()
    if last in _ALIASES:
        return _ALIASES[last]
    in_group = {f'{key.split(".")[0]}.{alias}': key for alias, key in _ALIASES.items()} | {key: key for key in SCHEMA}
    if matches := difflib.get_close_matches(name, list(in_group), 1, 0.6):
        return in_group[matches[0]]
    by_last = {key.rsplit('.', 1)[-1]: key for key in SCHEMA} | _ALIASES
    matches = difflib.get_close_matches(last, list(by_last), 1, 0.6)
    return by_last[matches[0]] if matches else ''
