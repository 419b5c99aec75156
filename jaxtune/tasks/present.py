"""What a recipe names is looked up before anything is loaded: a misspelt name costs a second, not the loading."""

from jaxtune.common import hub, sources
from jaxtune.common.settings import Settings
from jaxtune.config import is_rewarded, trains
from jaxtune.data.cache import prepared_tokens
from jaxtune.data.mixture import whole_weights
from jaxtune.data.records import check_path, check_tables
from jaxtune.data.templates import check_wanted
from jaxtune.errors import UserError
from jaxtune.pretrained.load import model_folder
from jaxtune.recipe.recipes import config_get
from jaxtune.rl import environments, rewards
from jaxtune.tasks import specs, teacher


def check(config: Settings) -> None:
    """Looks up the data, the template and the other models of a recipe, and imports its reward and its environment.

    Raises:
      UserError: one of them is not there; names its key.
    """
    for key in ('data.train', 'data.eval') if trains(config.task) else ('data.eval',):
        check_sources(config, key)
    check_wanted(config.data.template)
    objective = specs.objective(config)
    reference = objective.objective.reference if config.task == 'train' else None
    if reference and _is_given(path := reference.path(objective.settings) or ''):
        hub.resolve(model_folder(path, reference.key), reference.key)
    if config.task in ('train', 'evaluate'):
        teacher.check(config)
    if is_rewarded(config.task):
        environments.check(config.rl)
        if not config.rl.reward.startswith('@') and (config.rl.reward or not config.rl.environment):
            rewards.check(config.rl)


def check_sources(config: Settings, key: str) -> None:
    """Looks up what `data.train` or `data.eval` names.

    Raises:
      UserError: a path that is not there, a weight that is too small, or nothing that `auto` could hold out.
    """
    value = config_get(config, key)
    if key == 'data.eval' and value == sources.AUTO:
        _check_auto(config)
        return
    found = sources.read(value)
    if key == 'data.train' and trains(config.task) and found:
        whole_weights({source.label: source.weight for source in found})
    for source in found:
        if _is_given(source.path):
            check_path(source.path, key)
            guessed = trains(config.task) and (source.format or config.data.format) == 'auto'
            prepared = prepared_tokens(source.path, key) if key in ('data.train', 'data.eval') else None
            if guessed and prepared is None:
                check_tables(source.path, key)


def _check_auto(config: Settings) -> None:
    if config.task not in ('train', 'evaluate', 'export') and not is_rewarded(config.task):
        raise UserError(f'data.eval=auto: is for training and evaluating; expected a path for task={config.task}')
    if not config.data.train:
        raise UserError("data.eval=auto: holds out a share of data.train, which is ''; expected a path there")
    if not config.data.eval_fraction:
        raise UserError('data.eval=auto: data.eval_fraction=0 holds out nothing; expected more than 0')


def _is_given(path: str) -> bool:
    """Whether a key names something that is there by now: an earlier stage's output may not be."""
    return bool(path) and not path.startswith('@')
