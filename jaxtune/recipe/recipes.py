"""Reading, resolving, checking and comparing recipes.

A recipe names only what differs from the defaults of `jaxtune.config`; `resolve` applies it and the command line to
them, and rejects unknown keys and impossible values before anything else is loaded.
"""

import copy
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxtune.common import paths
from jaxtune.common.checks import ExpectedError, plain
from jaxtune.common.imports import of_file
from jaxtune.common.settings import Settings
from jaxtune.config import SCHEMA, Key, OpenSubtree, Sources
from jaxtune.errors import UserError, blamed_on, shown
from jaxtune.recipe import shipped
from jaxtune.recipe.aliases import nearest

# Keys that may change when a workdir is continued, since they do not affect results.
MAY_CHANGE = ('log.', 'checkpoint.', 'mesh.', 'data.engine', 'data.workers', 'data.slurm.', 'rl.reward_timeout')


# Groups of keys whose names stages may have: `sft.system` is the key, `sft.train.steps` the stage's.
STAGES_TOO = ('sft', 'reward', 'dpo', 'distill')


def _unknown(path: str, prefix: str = '') -> UserError:
    near = nearest(path)
    return UserError(
        f'{prefix}{shown(path)[1:-1]}: unknown key' + (f'; the nearest valid key is {prefix}{near}' if near else '')
    )


def child(node: Any, name: str) -> Any:
    """The subtree of a name, created if missing."""
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
        node[last] = ConfigDict(type_safe=False) if isinstance(key, OpenSubtree) else copy.deepcopy(key.default)
    return config


def flatten(config: Mapping | Settings, prefix: str = '') -> dict[str, Any]:
    """`{'train.steps': 10, ...}`; an open subtree is one value, a plain dict, and so are labelled sources."""
    flat = {}
    for name, value in config.items():
        path = f'{prefix}{name}'
        known = SCHEMA.get(path)
        if isinstance(known, OpenSubtree | Sources) or (known is not None and isinstance(value, Mapping | ConfigDict)):
            flat[path] = value.to_dict() if isinstance(value, ConfigDict) else value
        elif isinstance(value, Mapping | ConfigDict):
            if not any(key.startswith(path + '.') for key in SCHEMA):
                raise _unknown(path)
            flat.update(flatten(value, path + '.'))
        else:
            flat[path] = value
    return flat


def apply_overrides(config: Settings, changes: Mapping[str, Any], prefix: str = '') -> None:
    """Sets flat `{'train.steps': 10}` changes in place, checking names and values.

    Args:
      config: a full recipe.
      changes: flat path -> value.
      prefix: put before the path in messages (a stage's name and a dot).

    Raises:
      UserError: an unknown key or an impossible value.
    """
    for path, given in changes.items():
        value = given.tolist() if getattr(given, 'ndim', 0) and hasattr(given, 'tolist') else given  # of NumPy or JAX
        subtree, sources = _open_subtree(path), sources_key(path)
        key = SCHEMA.get(subtree or sources or path)
        if key is None:
            raise _unknown(path, prefix)
        if path == subtree and not isinstance(value, Mapping):
            raise UserError(f'{prefix}{path}={shown(value)}: expected a ConfigDict of {key.comment}')
        try:
            # The fields of a source are checked when all are there.
            value = key.check(value) if isinstance(key, Key) and sources in ('', path) else plain(value)
        except ExpectedError as error:
            raise UserError(f'{prefix}{path}={shown(value)}: expected {error}') from None
        try:
            if sources and path != sources:
                label_sources(config, sources, path, prefix)
            elif sources and isinstance(value, Mapping):
                value = ConfigDict(value, type_safe=False)
            _lay(config, path, value, whole=path == subtree)
        except AttributeError as error:  # of ConfigDict's own names, such as __class__
            raise UserError(f'{prefix}{path}: expected other names than a ConfigDict has itself: {error}') from None


def _lay(config: Settings, path: str, value: Any, whole: bool) -> None:
    """Sets a key; those of a `whole` open subtree are added to its own."""
    if whole:
        value = ConfigDict(config_get(config, path).to_dict() | value, type_safe=False)
    *parents, last = path.split('.')
    node: Any = config
    for parent in parents:
        node = child(node, parent)
    node[last] = value


def _open_subtree(path: str) -> str:
    """The open subtree that a path names or lies in; '' for other keys."""
    subtrees = (name for name, key in SCHEMA.items() if isinstance(key, OpenSubtree))
    return next((name for name in subtrees if path == name or path.startswith(f'{name}.')), '')


def sources_key(path: str) -> str:
    """The key of sources that a path names, or in whose mapping it lies; '' for other keys."""
    keys = (name for name, key in SCHEMA.items() if isinstance(key, Sources))
    return next((name for name in keys if path == name or path.startswith(f'{name}.')), '')


def label_sources(config: Settings, key: str, path: str, prefix: str = '') -> None:
    """Makes the value of a key a mapping of sources, where there is none yet, for a path into it to be set.

    Args:
      config: a full recipe.
      key: of sources.
      path: what will be set, a source or a field of one.
      prefix: put before the path in messages.

    Raises:
      UserError: the value is a path, which has no label; or a field has no parts.
    """
    parent, _, last = key.rpartition('.')
    node = config_get(config, parent)
    if path.count('.') > key.count('.') + 2:
        raise _unknown(path, prefix)
    if not node[last]:
        node[last] = ConfigDict(type_safe=False)
    elif isinstance(node[last], str):
        raise UserError(
            f'{prefix}{path}: {key} is {shown(node[last])}; expected a mapping of sources with labels there'
        )
    label, _, field = path.removeprefix(f'{key}.').partition('.')
    if field and isinstance(node[last].get(label), str):
        node[last][label] = ConfigDict({'path': node[last][label]}, type_safe=False)


def placeholder() -> config_dict.FieldReference:
    """An empty field that takes the type of the value it is set to."""
    return config_dict.placeholder(object)


def config_get(config: Settings, path: str) -> Any:
    """The value at a dotted path."""
    node: Any = config
    for name in path.split('.'):
        node = node[name]
    return node


def read_recipe(path: str) -> ConfigDict:
    """Runs a recipe file's `get_config()`.

    Raises:
      UserError: no such file, no `get_config`, or it does not return a ConfigDict.
    """
    if not paths.local(path, '--config').is_file():
        near = shipped.nearest(path) or 'quickstart'
        raise UserError(f'--config={shown(path)}: no such file; expected a recipe such as {shipped.find(near)}')
    if pathlib.Path(path).suffix != '.py':
        raise UserError(f'--config={path}: expected a Python file with get_config()')
    module, execute = of_file('recipe', path)
    with blamed_on('the recipe fails', path):
        execute()
    if not hasattr(module, 'get_config'):
        raise UserError(f'{path}: expected a function get_config()')
    with blamed_on('get_config() fails', path):
        recipe = module.get_config()
    if not isinstance(recipe, ConfigDict):
        raise UserError(f'{path}: get_config() returned {type(recipe).__name__}; expected an ml_collections.ConfigDict')
    return recipe


def stage_names(recipe: ConfigDict) -> tuple[str, ...]:
    """The stages of a recipe in their order; empty for a single task.

    Raises:
      UserError: a stage is named that the recipe does not hold, or names are not fit for folders.
    """
    stages = recipe.get('stages', ())
    if not isinstance(stages, tuple | list) or not all(isinstance(name, str) for name in stages):
        raise UserError(f"stages={shown(stages)}: expected a tuple of names such as ('prepare', 'pretrain')")
    tops = {path.split('.')[0] for path in SCHEMA} - set(STAGES_TOO)
    for name in stages:
        if not re.fullmatch(r'[A-Za-z][\w-]{0,99}', name) or name in tops:
            raise UserError(f'stages: {shown(name)} is no name for a stage; expected letters, not a key of a recipe')
        if not isinstance(recipe.get(name), ConfigDict):
            raise UserError(f'stages: {name!r} has no recipe; expected config.{name} to be a ConfigDict')
    if len(set(stages)) != len(stages):
        raise UserError(f'stages={stages!r}: a name stands twice')
    return tuple(stages)


def stage_recipe(recipe: ConfigDict, stage: str) -> Any:
    """A stage's own keys: a ConfigDict, as `stage_names` has checked."""
    return recipe[stage]


def of_stage(path: str, stages: Collection[str]) -> bool:
    """Whether a path of the command line is a key of one of the stages, not common to all."""
    return path.split('.')[0] in stages and path not in SCHEMA


def resolve(
    recipe: ConfigDict, overrides: Mapping[str, Any] | None = None, done: Sequence[str] = ()
) -> dict[str, ConfigDict]:
    """A recipe and the command line's overrides as full, checked recipes.

    Keys beside the stages' own are common to all stages; a stage's own win, the command line wins over both. `done` are
    stages that are not in the recipe, whose output its stages may read.

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
        apply_overrides(config, flatten(common))
        if stage:
            apply_overrides(config, flatten(stage_recipe(recipe, stage)), prefix)
        ours = {path: value for path, value in overrides.items() if not of_stage(path, stages)}
        apply_overrides(config, ours)
        known.update(ours)
        if stage:
            ours = {path: value for path, value in overrides.items() if of_stage(path, (stage,))}
            apply_overrides(config, {path[len(prefix) :]: value for path, value in ours.items()}, prefix)
            known.update(ours)
        _check_sources(config, prefix)
        _check_references(config, (*done, *configs), prefix)
        configs[stage] = config
    for path in overrides:
        if path not in known:
            raise _unknown(path)
    return configs


_SOURCES = tuple(path for path, key in SCHEMA.items() if isinstance(key, Sources))
REFERENCES = (
    'model.path',
    'method.path',
    'tokenizer.path',
    'data.train',
    'data.eval',
    'sft.demonstrations',
    'dpo.reference',
    'distill.teacher',
    'rl.reward',
)


def _source_paths(config: Settings) -> dict[str, Any]:
    """Key of every path inside `data.sources` and labelled sources -> its value."""
    values = {}
    for key in ('data.sources', *_SOURCES):
        sources = config_get(config, key)
        for label, source in sources.items() if isinstance(sources, Mapping | ConfigDict) else ():
            if isinstance(source, Mapping | ConfigDict):
                values[f'{key}.{label}.path'] = source.get('path')
            else:
                values[f'{key}.{label}'] = source
    return values


def _check_sources(config: Settings, prefix: str) -> None:
    for path in _SOURCES:
        value = config_get(config, path)
        if isinstance(value, ConfigDict):
            apply_overrides(config, {path: value.to_dict()}, prefix)
    for key, value in _source_paths(config).items():
        if isinstance(value, str) and (problem := paths.wrong(value)):
            raise UserError(f'{prefix}{key}={shown(value)}: expected {problem}')


def references_by_key(config: Settings) -> dict[str, str]:
    """Path of every key that names an earlier stage -> `@NAME`, those inside `data.sources` among them."""
    values = {path: config_get(config, path) for path in REFERENCES} | _source_paths(config)
    return {path: value for path, value in values.items() if isinstance(value, str) and value.startswith('@')}


def _check_references(config: Settings, earlier: tuple[str, ...], prefix: str) -> None:
    for path, value in references_by_key(config).items():
        if value[1:] not in earlier:
            names = ', '.join(f'@{name}' for name in earlier) or 'none'
            expected = f'the name of an earlier stage, of this run or done in the workdir ({names})'
            raise UserError(f'{prefix}{path}={value!r}: expected {expected}')


def references(config: Settings) -> set[str]:
    """Names of the earlier stages whose output a recipe reads."""
    return {value[1:] for value in references_by_key(config).values()}


def differing(old: Mapping, new: Settings) -> list[str]:
    """Keys in which two recipes differ so that a workdir can't be continued with the new one."""
    before: dict[str, Any] = flatten(old)
    after: dict[str, Any] = flatten(new)
    # A key added by a newer version held its default before.
    for path, key in SCHEMA.items():
        before.setdefault(path, {} if isinstance(key, OpenSubtree) else key.default)
    # What a program for another mesh needs is another result.
    free = tuple(key for key in MAY_CHANGE if key != 'mesh.' or after['task'] != 'compile')
    names = []
    for path, value in after.items():
        was = before[path]
        same = was == value or _listed(was) == _listed(value)
        grown = path == 'train.steps' and isinstance(was, int) and isinstance(value, int) and 0 < was <= value
        if not same and not grown and not path.startswith(free):
            names.append(f'{path} ({was!r} there, {value!r} here)')
    return names


def _listed(value: Any) -> Any:
    """A value as JSON gives it back: lists for tuples."""
    return [_listed(part) for part in value] if isinstance(value, tuple | list) else value


def changed(config: Settings) -> dict[str, Any]:
    """What differs from the defaults, flat."""
    base = flatten(defaults())
    return {path: value for path, value in flatten(config).items() if base.get(path) != value}
