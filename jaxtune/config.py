"""Every key of a recipe: its default, what it may be, and what it is for.

A recipe names only what differs; `load` lays it over these defaults, applies the command line, and refuses unknown
keys and impossible values before anything else is loaded.
"""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxtune.errors import UserError


class ExpectedError(ValueError):
    """A value is impossible; the text says what was expected."""


Check = Callable[[Any], Any]


def _one_of(*names: str) -> Check:
    def check(value):
        if value not in names:
            near = difflib.get_close_matches(str(value), names, 1)
            raise ExpectedError(f'one of {", ".join(names)}' + (f' (nearest: {near[0]})' if near else ''))
        return value

    return check


def _int(low: int | None = None, *words: str, high: int | None = None) -> Check:
    expected = 'an integer' + ('' if low is None else f' >= {low}') + ('' if high is None else f' and <= {high}')
    expected += ''.join(f" or '{word}'" for word in words)

    def check(value):
        if value in words:
            return value
        if isinstance(value, str) and re.fullmatch(r'[+-]?\d+', value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ExpectedError(expected)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ExpectedError(expected)
        return value

    return check


def _float(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Check:
    expected = 'a number' + ''.join(
        f' {sign} {bound:g}' for sign, bound in (('>=', low), ('>', above), ('<=', high)) if bound is not None
    )

    def check(value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpectedError(expected)
        value = float(value)
        outside = (low is not None and value < low) or (high is not None and value > high)
        if value != value or outside or (above is not None and value <= above):
            raise ExpectedError(expected)
        return value

    return check


def _bool(value):
    if not isinstance(value, bool):
        raise ExpectedError('True or False')
    return value


def _str(value):
    if not isinstance(value, str):
        raise ExpectedError('a text')
    return value


def _names(value):
    """A text, or several of them."""
    if isinstance(value, str) and value[:1] in '([':
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ExpectedError("a name or a tuple of names such as ('q_proj','v_proj')") from None
    if isinstance(value, str):
        return value
    if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
        raise ExpectedError("a name or a tuple of names such as ('q_proj','v_proj')")
    return tuple(value)


def _layers(value):
    """`all`, `4:8`, or the numbers of the layers."""
    if value == 'all' or (isinstance(value, str) and re.fullmatch(r'\d*:\d*', value)):
        return value
    if isinstance(value, tuple | list) and value and all(isinstance(i, int) and i >= 0 for i in value):
        return tuple(value)
    raise ExpectedError("'all', a range such as '4:8', or a tuple of layer numbers")


_axis = _int(-1)


def _mesh(value):
    value = _axis(value)
    if value == 0:
        raise ExpectedError('a size >= 1, or -1 for all remaining devices')
    return value


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    default: Any
    check: Check
    comment: str


class Free:
    """A subtree whose keys belong to somebody else (Hugging Face, a data step)."""

    def __init__(self, comment: str):
        self.comment = comment


_dtype = _one_of('float32', 'bfloat16')

SCHEMA: dict[str, Key | Free] = {
    'task': Key(
        'train',
        _one_of('prepare', 'train', 'ppo', 'grpo', 'evaluate', 'generate', 'export', 'compile'),
        'what to do',
    ),
    'seed': Key(0, _int(0), 'seed of initialisation, data order and sampling'),
    'model.path': Key('', _str, 'a Hugging Face folder, a hub id, a jaxtune workdir, @STAGE; empty = from scratch'),
    'model.config': Free('from scratch: Hugging Face config fields, model_type among them'),
    'model.param_dtype': Key('float32', _dtype, 'what parameters and optimizer state are kept in'),
    'model.compute_dtype': Key('float32', _dtype, 'what activations and matrix products use'),
    'model.remat': Key(
        'dots', _one_of('none', 'full', 'dots'), 'the backward pass computes again: nothing, all, or all but products'
    ),
    'model.attention': Key('auto', _one_of('auto', 'xla', 'flash'), 'attention kernel; the one that ran is logged'),
    'tokenizer.path': Key('', _str, "default: the model's own; @prepare; bytes = UTF-8 bytes, no file needed"),
    'objective': Key(
        'causal_lm',
        _one_of('causal_lm', 'masked_lm', 'span_corruption', 'seq2seq', 'classification', 'sft', 'reward', 'dpo'),
        'what is learnt',
    ),
    'masked_lm.probability': Key(0.15, _float(above=0, high=1), 'masked_lm: share of the tokens to predict'),
    'masked_lm.whole_word': Key(False, _bool, "masked_lm: a word's tokens are chosen together"),
    'span_corruption.mode': Key(
        'spans', _one_of('spans', 'prefix', 'ul2'), "span_corruption: T5's spans, a prefix to go on from, UL2's mixture"
    ),
    'span_corruption.density': Key(0.15, _float(above=0, high=0.9), 'spans: share of the tokens hidden'),
    'span_corruption.mean_length': Key(3.0, _float(1), 'spans: mean length of a hidden span'),
    'seq2seq.prefix': Key('', _str, "seq2seq: the task's name, put before every source"),
    'method.name': Key('full', _one_of('full', 'lora', 'qlora', 'adapter', 'prompt'), 'which weights are trained'),
    'method.rank': Key(16, _int(1), 'LoRA: rank of the update'),
    'method.alpha': Key(32.0, _float(above=0), 'LoRA: scale alpha / rank'),
    'method.dropout': Key(0.0, _float(0, 0.99), 'LoRA: dropout on its input'),
    'method.targets': Key('all-linear', _names, "LoRA: 'all-linear' or Hugging Face module names"),
    'method.layers': Key('all', _layers, "LoRA: 'all' or a range such as 4:8"),
    'method.rslora': Key(False, _bool, 'LoRA: scale alpha / sqrt(rank)'),
    'method.dora': Key(False, _bool, 'LoRA: train magnitudes apart from directions'),
    'method.block_size': Key(64, _int(16), 'NF4: weights that share one scale'),
    'method.double_quant': Key(True, _bool, 'NF4: quantise the scales too'),
    'method.bottleneck': Key(64, _int(1), 'adapter: width of the bottleneck'),
    'method.virtual_tokens': Key(20, _int(1), 'prompt tuning: how many trained tokens'),
    'method.init_text': Key('', _str, 'prompt tuning: text whose embeddings they start from; empty = random'),
    'data.train': Key('', _str, 'a path, glob, folder, dataset id, python-stdlib or @STAGE'),
    'data.eval': Key('', _str, 'the same, held out; generate and RL take their prompts from it'),
    'data.format': Key(
        'auto',
        _one_of('auto', 'text', 'pair', 'alpaca', 'sharegpt', 'messages', 'prompt', 'preference'),
        'what a record looks like',
    ),
    'data.template': Key('auto', _str, "auto (the tokenizer's chat template), a name, or a Jinja text"),
    'data.seq_len': Key(512, _int(2), 'tokens in a row of a batch'),
    'data.packing': Key(True, _bool, 'several documents a row; they never see each other'),
    'data.append_eos': Key(True, _bool, "end each text document with the tokenizer's EOS"),
    'data.text_key': Key('text', _str, 'field of a record that holds the text'),
    'data.source_key': Key('source', _str, 'field of a pair that is read'),
    'data.target_key': Key('target', _str, 'field of a pair that is written'),
    'data.target_len': Key(0, _int(0), 'tokens of a target in a row of a batch; 0 = data.seq_len'),
    'data.eval_fraction': Key(0.02, _float(0, 0.5), 'prepare: share of the documents held out'),
    'data.min_chars': Key(1, _int(0), 'prepare: shorter documents are left out'),
    'data.vocab_size': Key(8192, _int(300), 'prepare: size of the vocabulary to train'),
    'data.sources': Free('prepare: what to collect'),
    'data.steps': Free('prepare: cleaning, deduplication and filter steps with their thresholds'),
    'data.engine': Key('local', _one_of('local', 'slurm', 'ray'), 'prepare: where the steps run'),
    'train.steps': Key(0, _int(0), 'updates; 0 = by train.epochs'),
    'train.epochs': Key(1.0, _float(above=0), 'passes over the data, where train.steps is 0'),
    'train.batch_size': Key(8, _int(1), 'sequences an update, over the whole pod'),
    'train.accumulate': Key('auto', _int(1, 'auto'), 'micro-batches it is cut into; auto = as few as fit in memory'),
    'optimizer.name': Key(
        'adamw', _one_of('adamw', 'adamw8bit', 'adafactor', 'lion', 'muon', 'sgd'), 'how gradients become updates'
    ),
    'optimizer.lr': Key(2e-5, _float(above=0), 'peak learning rate of pretrained weights (all, from scratch)'),
    'optimizer.new_lr': Key(1e-4, _float(above=0), 'peak learning rate of weights that the model folder lacked'),
    'optimizer.schedule': Key('cosine', _one_of('cosine', 'linear', 'constant', 'wsd'), 'course after the warm-up'),
    'optimizer.warmup_steps': Key(0, _int(0), 'updates over which the rate rises from 0'),
    'optimizer.min_ratio': Key(0.1, _float(0, 1), 'cosine: where it ends, as a share of the peak'),
    'optimizer.decay_ratio': Key(0.2, _float(0, 1), 'wsd: last share of the updates, over which the rate falls to 0'),
    'optimizer.weight_decay': Key(0.01, _float(0), 'decoupled; kernels and embeddings only'),
    'optimizer.b1': Key(0.9, _float(0, 0.99999), 'decay of the first moment (momentum of sgd and muon)'),
    'optimizer.b2': Key(0.999, _float(0, 0.99999), 'decay of the second moment'),
    'optimizer.eps': Key(1e-8, _float(above=0), 'added to the root of the second moment'),
    'optimizer.clip_norm': Key(1.0, _float(0), 'gradients are scaled down to this global norm; 0 = off'),
    'optimizer.offload': Key(False, _bool, 'keep the state in pinned host memory'),
    'eval.every': Key(0, _int(0), 'updates between evaluations; 0 = only at the end'),
    'eval.batches': Key(0, _int(0), 'at most so many batches an evaluation; 0 = all'),
    'eval.batch_size': Key(0, _int(0), 'sequences a batch; 0 = that of a training micro-batch'),
    'eval.patience': Key(0, _int(0), 'stop after so many evaluations without a better value; 0 = off'),
    'eval.metric': Key('eval/loss', _str, 'what "better" means; accuracies and rewards rise, all else falls'),
    'checkpoint.every': Key(0, _int(0), 'updates between checkpoints; 0 = at evaluations and at the end'),
    'checkpoint.keep': Key(1, _int(1), 'newest checkpoints kept; the best by eval.metric is kept beside them'),
    'generate.max_new_tokens': Key(128, _int(1), 'length of a completion at most'),
    'generate.temperature': Key(1.0, _float(0), '0 = greedy'),
    'generate.top_k': Key(0, _int(0), 'sample among the k likeliest; 0 = all'),
    'generate.top_p': Key(1.0, _float(above=0, high=1), 'sample among the likeliest of this total probability'),
    'generate.samples': Key(1, _int(1), 'completions a prompt'),
    'generate.prompts': Key(0, _int(0), 'at most so many prompts; 0 = all'),
    'generate.prompt_tokens': Key(
        0, _int(0), 'the first so many tokens of each text are the prompt; 0 = the whole text'
    ),
    'generate.beams': Key(1, _int(1), 'beam search: so many hypotheses a prompt, the best is kept; 1 = off'),
    'generate.length_penalty': Key(
        1.0, _float(), "beam search: a hypothesis' log-probability is divided by its length to this power"
    ),
    'generate.batch_size': Key(8, _int(1), 'prompts sampled together'),
    'rl.rollouts': Key(64, _int(1), 'completions sampled an update'),
    'rl.group': Key(8, _int(2), 'grpo: completions a prompt'),
    'rl.kl_coef': Key(0.05, _float(0), 'weight of the divergence from the reference'),
    'rl.clip': Key(0.2, _float(above=0), 'PPO: clip range of the probability ratio'),
    'rl.value_clip': Key(0.2, _float(0), 'PPO: clip range of the value; 0 = off'),
    'rl.gamma': Key(1.0, _float(0, 1), 'PPO: discount'),
    'rl.gae_lambda': Key(0.95, _float(0, 1), 'PPO: generalised advantage estimation'),
    'rl.epochs': Key(4, _int(1), 'PPO: passes over each batch of rollouts'),
    'rl.reward': Key('', _str, 'a reward-model workdir, @STAGE, or module:function'),
    'mesh.data': Key(-1, _mesh, 'copies of the model, each with its own rows'),
    'mesh.fsdp': Key(1, _mesh, 'parameters and rows divided'),
    'mesh.tensor': Key(1, _mesh, 'heads and widths divided'),
    'mesh.sequence': Key(1, _mesh, 'length divided'),
    'compile.topology': Key('', _str, 'v5e:16x16, v5p:2x2x1, cuda:h200x8 …: compile for hardware that is not there'),
    'log.every': Key(10, _int(1), 'updates between lines of metrics.jsonl'),
    'log.wandb': Key(False, _bool, 'send the metrics to Weights & Biases too'),
}

# What may differ when a workdir is continued, since it changes no result.
MAY_CHANGE = ('log.', 'checkpoint.', 'mesh.')


def nearest(name: str, names) -> str:
    """The valid name most like a misspelt one, by whole path or by its last part; '' if none is close."""
    found = difflib.get_close_matches(name, list(names), 1, 0.6)
    if found:
        return found[0]
    by_last = {other.rsplit('.', 1)[-1]: other for other in names}
    found = difflib.get_close_matches(name.rsplit('.', 1)[-1], list(by_last), 1, 0.6)
    return by_last[found[0]] if found else ''


def _unknown(path: str, prefix: str = '') -> UserError:
    near = nearest(path, SCHEMA)
    return UserError(f'{prefix}{path}: unknown key' + (f'; the nearest valid key is {prefix}{near}' if near else ''))


def child(node: ConfigDict, name: str) -> ConfigDict:
    """The subtree under a name, made if it is not there."""
    if name not in node:
        node[name] = ConfigDict(type_safe=False)
    return node[name]


def defaults() -> ConfigDict:
    """All keys with their defaults."""
    config = ConfigDict(type_safe=False)
    for path, key in SCHEMA.items():
        *parents, last = path.split('.')
        node = config
        for parent in parents:
            node = child(node, parent)
        node[last] = ConfigDict(type_safe=False) if isinstance(key, Free) else copy.deepcopy(key.default)
    return config


def flatten(config: Mapping, prefix: str = '') -> dict[str, Any]:
    """`{'train.steps': 10, ...}`; a free subtree is one value, a plain dict."""
    flat = {}
    for name, value in config.items():
        path = f'{prefix}{name}'
        if isinstance(SCHEMA.get(path), Free):
            flat[path] = value.to_dict() if isinstance(value, ConfigDict) else value
        elif isinstance(value, Mapping | ConfigDict):
            if path not in SCHEMA and not any(key.startswith(path + '.') for key in SCHEMA):
                raise _unknown(path)
            flat.update(flatten(value, path + '.'))
        else:
            flat[path] = value
    return flat


def lay_over(config: ConfigDict, changes: Mapping[str, Any], prefix: str = '') -> None:
    """Sets flat `{'train.steps': 10}` changes in place, checking names and values.

    Args:
      config: a full recipe.
      changes: flat path -> value.
      prefix: put before the path in messages (a stage's name and a dot).

    Raises:
      UserError: an unknown key or an impossible value.
    """
    for path, value in changes.items():
        free = next((key for key, kind in SCHEMA.items() if isinstance(kind, Free) and path.startswith(key)), None)
        if free is None or (path != free and not path.startswith(free + '.')):
            if path not in SCHEMA:
                raise _unknown(path, prefix)
            try:
                value = SCHEMA[path].check(value)
            except ExpectedError as error:
                raise UserError(f'{prefix}{path}={value!r}: expected {error}') from None
        elif path == free:
            if not isinstance(value, Mapping):
                raise UserError(f'{prefix}{path}={value!r}: expected a ConfigDict of {SCHEMA[free].comment}')
            value = ConfigDict({**config_get(config, path).to_dict(), **value}, type_safe=False)
        *parents, last = path.split('.')
        node = config
        for parent in parents:
            node = child(node, parent)
        node[last] = value


def placeholder() -> config_dict.FieldReference:
    """An empty field whose type is read off the value that it is given."""
    return config_dict.placeholder(object)


def config_get(config: ConfigDict, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split('.'):
        config = config[name]
    return config


def read_recipe(path: str) -> ConfigDict:
    """Runs a recipe file's `get_config()`.

    Raises:
      UserError: no such file, no `get_config`, or it does not return a ConfigDict.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f'--config={path}: no such file; expected a recipe such as configs/quickstart.py')
    spec = importlib.util.spec_from_file_location('recipe', path)
    if spec is None:
        raise UserError(f'--config={path}: expected a Python file with get_config()')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f'{_place(error, path)}: the recipe fails: {type(error).__name__}: {error}') from None
    if not hasattr(module, 'get_config'):
        raise UserError(f'{path}: expected a function get_config()')
    try:
        recipe = module.get_config()
    except Exception as error:
        raise UserError(f'{_place(error, path)}: get_config() fails: {type(error).__name__}: {error}') from None
    if not isinstance(recipe, ConfigDict):
        raise UserError(f'{path}: get_config() returned {type(recipe).__name__}; expected an ml_collections.ConfigDict')
    return recipe


def _place(error: Exception, path: str) -> str:
    """`file:line` of the recipe's own last frame in a traceback."""
    line, trace = getattr(error, 'lineno', None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f'{path}:{line}' if line else path


def stage_names(recipe: ConfigDict) -> tuple[str, ...]:
    """The stages of a recipe in their order; empty for a single task.

    Raises:
      UserError: a stage is named that the recipe does not hold, or names are not fit for folders.
    """
    stages = recipe.get('stages', ())
    if not isinstance(stages, tuple | list) or not all(isinstance(name, str) for name in stages):
        raise UserError(f"stages={stages!r}: expected a tuple of names such as ('prepare', 'pretrain')")
    tops = {path.split('.')[0] for path in SCHEMA}
    for name in stages:
        if not re.fullmatch(r'[A-Za-z][\w-]*', name) or name in tops:
            raise UserError(f'stages: {name!r} is no name for a stage; expected letters, not a key of a recipe')
        if not isinstance(recipe.get(name), ConfigDict):
            raise UserError(f'stages: {name!r} has no recipe; expected config.{name} to be a ConfigDict')
    if len(set(stages)) != len(stages):
        raise UserError(f'stages={stages!r}: a name stands twice')
    return tuple(stages)


def resolve(recipe: ConfigDict, overrides: Mapping[str, Any] | None = None) -> dict[str, ConfigDict]:
    """A recipe and the command line's overrides as full, checked recipes.

    Keys beside the stages' own are common to all stages; a stage's own win, the command line wins over both.

    Returns:
      `{'': config}` for a single task, `{stage: config}` in order for stages.

    Raises:
      UserError: an unknown key or an impossible value.
    """
    overrides = dict(overrides or {})
    stages = stage_names(recipe)
    common = {name: value for name, value in recipe.items() if name != 'stages' and name not in stages}
    configs = {}
    known = set()
    for stage in stages or ('',):
        prefix = f'{stage}.' if stage else ''
        config = defaults()
        lay_over(config, flatten(common))
        if stage:
            own = recipe[stage]
            lay_over(config, flatten(own), prefix)
        ours = {path: value for path, value in overrides.items() if path.split('.')[0] not in stages}
        lay_over(config, ours)
        known.update(ours)
        if stage:
            ours = {path: value for path, value in overrides.items() if path.startswith(prefix)}
            lay_over(config, {path[len(prefix) :]: value for path, value in ours.items()}, prefix)
            known.update(ours)
        _check_references(config, tuple(configs), prefix)
        configs[stage] = config
    for path in overrides:
        if path not in known:
            raise _unknown(path)
    return configs


REFERENCES = ('model.path', 'tokenizer.path', 'data.train', 'data.eval', 'rl.reward')


def _check_references(config: ConfigDict, earlier: tuple[str, ...], prefix: str) -> None:
    for path in REFERENCES:
        value = config_get(config, path)
        if value.startswith('@') and value[1:] not in earlier:
            names = ', '.join(f'@{name}' for name in earlier) or 'none'
            raise UserError(f'{prefix}{path}={value!r}: expected the name of an earlier stage ({names})')


def references(config: ConfigDict) -> set[str]:
    """Names of the earlier stages whose output a recipe reads."""
    values = [config_get(config, path) for path in REFERENCES]
    return {value[1:] for value in values if value.startswith('@')}


def point_to_stages(config: ConfigDict, root: pathlib.Path) -> ConfigDict:
    """A copy in which `@NAME` is the folder of the stage NAME below `root`."""
    config = copy.deepcopy(config)
    for path in REFERENCES:
        value = config_get(config, path)
        if value.startswith('@'):
            parent, last = path.rsplit('.', 1)
            config_get(config, parent)[last] = str(root / value[1:])
    return config


def differing(old: Mapping, new: ConfigDict) -> list[str]:
    """Keys in which two recipes differ so that a workdir can't be continued with the new one."""
    before, after = flatten(old), flatten(new)
    # A key added by a newer version held its default before.
    for path, key in SCHEMA.items():
        before.setdefault(path, {} if isinstance(key, Free) else key.default)
    names = []
    for path, value in after.items():
        was = before[path]
        same = was == value or (isinstance(value, tuple) and was == list(value))
        grown = path == 'train.steps' and isinstance(was, int) and 0 < was <= value
        if not same and not grown and not path.startswith(MAY_CHANGE):
            names.append(f'{path} ({was!r} there, {value!r} here)')
    return names


def changed(config: ConfigDict) -> dict[str, Any]:
    """What differs from the defaults, flat."""
    base = flatten(defaults())
    return {path: value for path, value in flatten(config).items() if base.get(path) != value}
