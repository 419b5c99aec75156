"""The command line: `--config RECIPE.py --workdir DIR --overwrite --check --config.KEY=VALUE …`."""

import contextlib
import dataclasses
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from jaxtune.common import paths
from jaxtune.common.checks import ExpectedError, described
from jaxtune.common.settings import Settings
from jaxtune.config import SCHEMA, Key, OpenSubtree, Sources
from jaxtune.errors import UserError, reason, shown
from jaxtune.recipe import recipes, shipped
from jaxtune.recipe.aliases import nearest
from jaxtune.recipe.workdir import done

USAGE = (
    'python -m jaxtune.main --config configs/RECIPE.py [--workdir DIR] [--overwrite] [--check] [--config.KEY=VALUE ...]'
)


@dataclasses.dataclass(frozen=True)
class Command:
    """The parsed command line, and `result.json` of each earlier stage that is done in the workdir.

    With `check`, everything is checked and nothing runs.
    """

    recipe: str
    workdir: pathlib.Path
    overwrite: bool
    configs: Mapping[str, Settings]
    argv: tuple[str, ...]
    finished: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    check: bool = False


def _recipe_path(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--config PATH` out of the arguments: the recipe must be read before its keys can be flags."""
    path, rest, words = '', [], iter(argv)
    for word in words:
        if word in ('--config', '-config'):
            path = next(words, '')
        elif match := re.match(r'--?config=(.*)', word):
            path = match[1]
        else:
            rest.append(word)
    if not path:
        raise UserError(f'--config: expected a recipe. Usage: {USAGE}')
    return shipped.find(path) or path, rest


def _choose_stages(recipe: ConfigDict, words: Sequence[str]) -> list[str]:
    """Takes `--config.stages=NAME,...` out of the arguments; leaves those stages in the recipe, in their order."""
    given = [word for word in words if re.match(r'--?config\.stages=', word)]
    stages = recipes.stage_names(recipe)
    for word in given:
        value = word.partition('=')[2]
        chosen = re.findall(r'[\w-]+', value)
        if not chosen or not set(chosen) <= set(stages):
            expected = f'some of {",".join(stages)}' if stages else 'a recipe that has stages'
            raise UserError(f'--config.stages={value}: expected {expected}')
        with recipe.unlocked():
            recipe.stages = tuple(name for name in stages if name in chosen)
            for name in set(stages) - set(chosen):
                del recipe[name]
    return [word for word in words if word not in given]


def _set_sources(recipe: ConfigDict, words: Sequence[str]) -> list[str]:
    """Reads `--config.data.sources.LABEL=PATH`; an empty one removes the source, of one with fields it sets `path`.

    The same for `data.train` and `data.eval`, whose sources always have fields.
    """
    rest, place = [], r'(--?config\.(?:([\w-]+)\.)?data\.(sources|train|eval)\.([^.=]+))=(.*)'
    for word in words:
        match = re.fullmatch(place, word, re.DOTALL)
        own: Any = recipe.get(match[2], {}) if match and match[2] else recipe
        sources = own.get('data', {}).get(match[3], {}) if match else {}
        label, value = match.group(4, 5) if match else ('', '')
        if match and not value:
            if isinstance(sources, str) or label not in sources:
                names = '' if isinstance(sources, str) else ', '.join(sources)
                names = names or 'none'
                raise UserError(f'{word}: expected the label of a source to leave out ({names}), or its path')
            with recipe.unlocked():
                del sources[label]
        elif match and (match[3] != 'sources' or isinstance(sources.get(label), ConfigDict)):
            rest.append(f'{match[1]}.path={value}')
        else:
            rest.append(word)
    return rest


def _in_open_subtree(path: str) -> bool:
    return any(isinstance(kind, OpenSubtree | Sources) and path.startswith(f'{key}.') for key, kind in SCHEMA.items())


def _refuse_left_out(named: Sequence[str], all_stages: Sequence[str], stages: Sequence[str]) -> None:
    """Rejects keys of stages that `--config.stages` leaves out."""
    for path in named:
        stage = path.partition('.')[0]
        if recipes.of_stage(path, all_stages) and stage not in stages:
            raise UserError(f'--config.{path}: expected a key of a stage to run, --config.stages={",".join(stages)}')


def _read_as_texts(values: ConfigDict) -> None:
    """Makes keys whose own check reads tuples and mappings texts, which absl would take apart by rules of its own."""
    for path, key in SCHEMA.items():
        if isinstance(key, Key) and key.check is described:
            *parents, last = path.split('.')
            recipes.config_get(values, '.'.join(parents))[last] = ''


def _flag_values(recipe: ConfigDict, stages: Sequence[str], named: Sequence[str]) -> ConfigDict:
    """Every key that may be given as a flag, with a value of its type."""
    values = recipes.defaults()
    common = {name: value for name, value in recipe.items() if name != 'stages' and name not in stages}
    recipes.apply_overrides(values, recipes.flatten(common))
    _read_as_texts(values)
    for stage in stages:
        own = recipes.defaults()
        recipes.apply_overrides(own, recipes.flatten(recipes.stage_recipe(recipe, stage)), f'{stage}.')
        _read_as_texts(own)
        group: Any = values.get(stage, {})  # of keys that have the stage's name
        for name, value in group.items():
            own[name] = value
        values[stage] = own
    for path in named:
        *parents, last = path.split('.')
        stage = parents[0] if parents and recipes.of_stage(path, stages) else ''
        own = path[len(stage) + 1 :] if stage else path
        if own not in SCHEMA and not _in_open_subtree(own):
            near = nearest(own)
            prefix = f'{stage}.' if stage else ''
            hint = f'; the nearest valid key is config.{prefix}{near}' if near else ''
            raise UserError(f'--config.{path}: unknown key{hint}')
        if not all(part.isidentifier() for part in path.split('.')):
            raise UserError(f'--config.{path}: expected names of letters, digits and _, with a dot between them')
        if sources := recipes.sources_key(own):
            group: Any = values[stage] if stage else values
            _prepare_sources(group, sources, own, f'--config.{path[: len(path) - len(own)]}')
        if _in_open_subtree(own):  # the type of a key that no recipe names is read off the value
            node = values
            for parent in parents:
                node = recipes.child(node, parent)
            if last not in node:
                node[last] = recipes.placeholder()
    return values


def _prepare_sources(values: ConfigDict, key: str, path: str, prefix: str) -> None:
    """Gives sources the type that a flag sets: a text for all of them, a mapping for a field of one."""
    if path == key:
        parent, _, last = key.rpartition('.')
        recipes.config_get(values, parent)[last] = ''
    else:
        recipes.label_sources(values, key, path, prefix)


def parse(argv: Sequence[str]) -> Command:
    """Reads the command line.

    Raises:
      UserError: no recipe, an unknown key, an impossible value.
    """
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f'{shown(word)}: expected arguments in UTF-8') from None
    recipe_path, rest = _recipe_path(argv[1:])
    recipe = recipes.read_recipe(recipe_path)
    all_stages = recipes.stage_names(recipe)
    rest = _set_sources(recipe, _choose_stages(recipe, rest))
    stages = recipes.stage_names(recipe)
    named = [match[1] for word in rest if (match := re.match(r'--?(?:no)?config\.([^=]+)', word))]
    holder = flags.FlagValues()
    flags.DEFINE_string('workdir', '', 'where results go', flag_values=holder)
    flags.DEFINE_boolean('overwrite', False, 'start anew in a workdir of another recipe', flag_values=holder)
    flags.DEFINE_boolean('check', False, 'check everything, and run nothing', flag_values=holder)
    _refuse_left_out(named, all_stages, stages)
    values = _flag_values(recipe, stages, named)
    words = [argv[0], *rest]
    try:
        with _sys_argv(words):
            config_flags.DEFINE_config_dict('config', values, flag_values=holder)
            config_flag = holder['config']
            others = holder(words)[1:]
    except flags.Error as error:
        raise _refused(str(error), stages) from None
    except (ValueError, TypeError, RecursionError, MemoryError) as error:  # of Python's own parser of a value
        given = ', '.join(f'--config.{path}' for path in named)
        raise UserError(f'{given or " ".join(rest)}: cannot be read: {reason(error)}') from None
    if others:
        raise UserError(f'{others[0]!r}: expected flags only. Usage: {USAGE}')
    overrides: dict[str, Any] = config_flags.get_override_values(config_flag)
    workdir = _workdir(holder.workdir or f'runs/{pathlib.Path(recipe_path).stem}')
    before = itertools.takewhile(lambda name: name not in stages, all_stages)
    finished = {name: result for name in before if (result := done(workdir / name))}
    configs = recipes.resolve(recipe, overrides, tuple(finished))
    return Command(recipe_path, workdir, holder.overwrite, configs, tuple(argv), finished, holder.check)


def _workdir(path: str) -> pathlib.Path:
    folder = paths.local(path, '--workdir')
    if blocking := next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None):
        raise UserError(f'--workdir={path}: expected a folder; {blocking} is a file')
    return folder


def _refused(text: str, stages: Sequence[str]) -> UserError:
    """Absl's error as a `UserError`; for the value of a key, what the key expects."""
    match = re.match(r'flag --config\.([\w.-]+)=(.*?): ', text)
    if match:
        path, value = match.groups()
        rest = path.partition('.')[2]
        key = SCHEMA.get(rest if recipes.of_stage(path, stages) else path)
        if isinstance(key, Key):
            try:
                key.check(value)
            except ExpectedError as error:
                return UserError(f'--config.{path}={shown(value)}: expected {error}')
    return UserError(' '.join(text.split()))


@contextlib.contextmanager
def _sys_argv(words: list[str]) -> Iterator[None]:
    """Sets `sys.argv`: config_flags reads its overrides from there when the flag is defined."""
    saved, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = saved
