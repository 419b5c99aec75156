"""What a recipe names is looked up before anything is loaded: a misspelt name costs a second, not the loading."""

from jaxtune.common import hub
from jaxtune.common.settings import Settings
from jaxtune.config import is_rewarded, trains
from jaxtune.data.records import check_path, check_tables
from jaxtune.data.templates import check_wanted
from jaxtune.pretrained.load import model_folder
from jaxtune.recipe.recipes import config_get
from jaxtune.rl import rewards
from jaxtune.tasks import specs


def check(config: Settings) -> None:
    """Looks up the data, the template and the other models of a recipe, and imports the user's reward function.

    Raises:
      UserError: one of them is not there; names its key.
    """
    for key in ('data.train', 'data.eval') if trains(config.task) else ('data.eval',):
        if _is_given(path := config_get(config, key)):
            check_path(path, key)
            if trains(config.task) and config.data.format == 'auto':
                check_tables(path, key)
    check_wanted(config.data.template)
    objective = specs.objective(config)
    reference = objective.objective.reference if config.task == 'train' else None
    if reference and _is_given(path := reference.path(objective.settings) or ''):
        hub.resolve(model_folder(path, reference.key), reference.key)
    if is_rewarded(config.task) and not config.rl.reward.startswith('@'):
        rewards.check(config.rl.reward, config.rl.reward_timeout)


def _is_given(path: str) -> bool:
    """Whether a key names something that is there by now: an earlier stage's output may not be."""
    return bool(path) and not path.startswith('@')
