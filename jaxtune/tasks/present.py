"""What a recipe names is looked up before anything is loaded: a misspelt name costs a second, not the loading."""

from ml_collections import ConfigDict

from jaxtune.common import hub
from jaxtune.config import REWARDED, TRAINING
from jaxtune.data.records import check_path, check_tables
from jaxtune.data.templates import check_wanted
from jaxtune.pretrained.load import model_folder
from jaxtune.recipe.recipes import config_get
from jaxtune.rl import rewards


def check(config: ConfigDict) -> None:
    """Looks up the data, the template and the other models of a recipe, and imports a person's reward function.

    Raises:
      UserError: one of them is not there; names its key.
    """
    for key in ('data.train', 'data.eval') if config.task in TRAINING else ('data.eval',):
        if _is_given(path := config_get(config, key)):
            check_path(path, key)
            if config.task in TRAINING and config.data.format == 'auto':
                check_tables(path, key)
    check_wanted(config.data.template)
    if config.task == 'train' and config.objective == 'dpo' and _is_given(config.dpo.reference):
        hub.resolve(model_folder(config.dpo.reference, 'dpo.reference'), 'dpo.reference')
    if config.task in REWARDED and not config.rl.reward.startswith('@'):
        rewards.check(config)


def _is_given(path: str) -> bool:
    """Whether a key names something that is there by now: an earlier stage's output may not be."""
    return bool(path) and not path.startswith('@')
