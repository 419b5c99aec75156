"""Whether a dataset's id can be opened at all, asked before a loader that tries for half a minute is."""

import pathlib

from jaxtune.errors import UserError, reason

_SECONDS = 10.0  # for the hub to answer


def check(path: str, name: str) -> None:
    """Refuses what is no dataset's id after all.

    Args:
      path: what may be one, with a configuration and a split after colons or without; no such file is there.
      name: the key and its value, for the message.

    Raises:
      UserError: it begins with a folder of this machine; or neither the hub nor its cache here has such a dataset.
    """
    dataset = path.split(':')[0]
    owner, slash, _ = dataset.partition('/')
    if slash and pathlib.Path(owner).is_dir():
        raise UserError(f'{name}: no such file or folder; {owner}/ does not hold it')
    from huggingface_hub import HfApi, constants  # slow to import

    if constants.HF_HUB_OFFLINE:
        said = 'HF_HUB_OFFLINE is set'
    else:
        try:
            HfApi().dataset_info(dataset, timeout=_SECONDS)
            return
        except Exception as error:  # network, names, rights: each raises its own
            said = reason(error)
    from datasets import config  # slow to import

    if not (pathlib.Path(config.HF_DATASETS_CACHE) / dataset.replace('/', '___')).is_dir():
        raise UserError(f'{name}: no such file or folder, and the hub gives no dataset of that id: {said}')
