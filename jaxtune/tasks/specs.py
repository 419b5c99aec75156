"""What the rooms below work with, as values: made of a recipe here, where alone a whole recipe is seen."""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune.common import sources
from jaxtune.common.settings import Settings
from jaxtune.common.sources import AUTO, DataSource
from jaxtune.config import is_rewarded, trains
from jaxtune.data.holdout import Holdout
from jaxtune.data.spec import DataSpec
from jaxtune.errors import UserError
from jaxtune.generation.prompts import PromptSpec
from jaxtune.methods import METHODS, BoundMethod
from jaxtune.models import Model
from jaxtune.objectives import OBJECTIVES, BoundObjective, Objective
from jaxtune.pretrained.load import ModelSpec
from jaxtune.rl import ALGORITHMS, Algorithm
from jaxtune.rl.policy import BoundAlgorithm
from jaxtune.training.balance import Balance


def algorithm(config: Settings) -> Algorithm:
    """The algorithm that the task names, as the recipe's `rl` has it.

    Raises:
      UserError: two keys of `rl` make no sense together.
    """
    found = ALGORITHMS.get(config.task)
    return dataclasses.replace(found, **found.adapted(config.rl))


def data_spec(config: Settings, **changes: Any) -> DataSpec:
    """The recipe's `data`, with what of `sft` and `model` belongs to it."""
    data = config.data
    same = ('format', 'template', 'seq_len', 'target_len', 'packing', 'append_eos')
    values = {name: data[name] for name in (*same, 'text_key', 'source_key', 'target_key')}
    values['template_args'] = data.template_args.to_dict()
    values |= {'system': config.sft.system, 'demonstrations': config.sft.demonstrations, 'seed': config.seed}
    values |= {split: _sources(data[split]) for split in ('train', 'eval')}
    if data.eval == AUTO:
        values |= {'eval': values['train'], 'holdout': Holdout(data.eval_fraction, config.seed)}
    values |= {'labels_of': config.model.path, 'default_labels': ('0', '1') if config.task == 'compile' else ()}
    return DataSpec(**(values | changes))


def _sources(value: Any) -> str | tuple[DataSource, ...]:
    return value if isinstance(value, str) else sources.read(value)


def _settings_of(config: Settings, objective: Objective) -> Any:
    """The subtree of an objective: its own, `custom` for one named as `module:NAME`, or empty where there is none."""
    shipped = objective.name in OBJECTIVES.names
    return config.get(objective.name if shipped else 'custom', ConfigDict())


def objective(config: Settings, name: str = '', **data: Any) -> BoundObjective:
    """The recipe's objective, or another, over its data, of which some values may be others."""
    chosen = OBJECTIVES.get(name or config.objective)
    return BoundObjective(chosen, _settings_of(config, chosen), data_spec(config, **data))


def method(config: Settings) -> BoundMethod:
    """The recipe's tuning method."""
    return BoundMethod(METHODS.get(config.method.name), config.method, config.seed)


def bound_algorithm(config: Settings) -> BoundAlgorithm:
    """The recipe's algorithm."""
    rl, generate = config.rl, config.generate
    one_update = rl.epochs == 1 and rl.rollouts == config.train.batch_size
    sizes = (config.data.seq_len, generate.temperature, generate.max_new_tokens)
    return BoundAlgorithm(algorithm(config), rl, *sizes, one_update)


def balance(config: Settings, mesh: Mesh, model: Model) -> Balance:
    """How the recipe keeps experts evenly used.

    Raises:
      UserError: it asks for what the model has not; names the key.
    """
    moe, experts, parts = config.moe, getattr(model.config, 'experts', None), mesh.shape['expert']
    if parts > 1 and (experts is None or experts.count % parts):
        there = 'this model has no experts' if experts is None else f'a divisor of the {experts.count} experts'
        raise UserError(f'mesh.expert={parts}: expected {"1: " if experts is None else ""}{there}')
    for key in ('aux_loss', 'z_loss', 'bias_rate'):
        if experts is None and moe[key] not in (0.0, 'auto'):
            raise UserError(f'moe.{key}={moe[key]}: expected 0: this model has no experts')
    if experts and moe.bias_rate and not experts.corrected:
        raise UserError(f'moe.bias_rate={moe.bias_rate}: expected 0: the routers of this model have no such bias')
    aux_loss = moe.aux_loss
    if aux_loss == 'auto':
        aux_loss = experts.aux_loss if experts else 0.0
    return Balance(aux_loss, moe.z_loss, moe.bias_rate)


def scores_export(config: Settings) -> bool:
    """Whether `task=export` tells what its format costs in held-out loss."""
    return config.export.requantise or (config.export.format == 'gguf' and bool(config.data.eval))


def model_spec(config: Settings, key: str = 'model.path') -> ModelSpec:
    """The recipe's model."""
    task, rows = config.task, None
    if is_rewarded(task):
        rows = objective(config, 'causal_lm')
    elif task in ('train', 'evaluate', 'compile') or (task == 'export' and scores_export(config)):
        rows = objective(config)
    return ModelSpec(
        path=config.model.path,
        settings=config.model,
        tokenizer=config.tokenizer.path,
        method=method(config),
        adapters=config.method.path,
        several=task == 'generate',
        rows=rows,
        trains=trains(task),
        new_heads=task == 'train',
        value_head=is_rewarded(task) and algorithm(config).value_head,
        seed=config.seed,
        key=key,
        added=tuple(config.tokenizer.add),
        overrides=config.model.config.to_dict() if config.model.path else {},
    )


def other_model_spec(config: Settings, key: str, path: str, objective_name: str = '', **data: Any) -> ModelSpec:
    """Another model than the recipe's own, to be asked: whole, with its own tokenizer.

    Args:
      config: the recipe.
      key: that names it.
      path: what it names: a folder, hub id or workdir; an adapter's own base comes with it.
      objective_name: whose head it has; '' = the recipe's, whose rows it reads with the tokens that the recipe adds.
      data: other values of the data that it reads.
    """
    return ModelSpec(
        path=path,
        settings=config.model,
        tokenizer='',
        method=BoundMethod(METHODS.get('full'), config.method, config.seed),
        rows=objective(config, objective_name, **data),
        seed=config.seed,
        key=key,
        added=() if objective_name else tuple(config.tokenizer.add),
    )


def reward_model_spec(config: Settings, path: str = '') -> ModelSpec:
    """A reward model, by default what `rl.reward` names; its rows are as long as what it reads."""
    return other_model_spec(config, 'rl.reward', path or config.rl.reward, 'reward', seq_len=2)


def prompt_spec(config: Settings, **changes: Any) -> PromptSpec:
    """The prompts of the recipe's data."""
    generate = config.generate
    values = {'max_new_tokens': generate.max_new_tokens, 'count': generate.prompts}
    values |= {'prompt_tokens': generate.prompt_tokens, 'prefix': config.seq2seq.prefix, 'data': data_spec(config)}
    return PromptSpec(**(values | changes))


def accumulate_at_least(config: Settings) -> int:
    """Micro-batches of an update, where the recipe says how many; else 1."""
    return 1 if config.train.accumulate == 'auto' else config.train.accumulate
