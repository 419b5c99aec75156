"""Model folders, on this machine or on the Hugging Face hub. Pickles and code are neither fetched nor read."""

import pathlib

from jaxtune.errors import UserError
from jaxtune.hubnames import TOKENIZER_FILES, is_id

# Files that travel with a model: tokenizer, chat template, generation settings.
COMPANIONS = (
    'added_tokens.json',
    'chat_template.jinja',
    'chat_template.json',
    'generation_config.json',
    'merges.txt',
    'special_tokens_map.json',
    *TOKENIZER_FILES,
)
_FETCHED = ('config.json', '*.safetensors', '*.safetensors.index.json', *COMPANIONS)


def resolve(path: str) -> pathlib.Path:
    """The folder of a model: `path` itself, or where the hub's cache keeps the id `path`.

    Raises:
      UserError: neither a folder nor an id that can be fetched.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not is_id(path):
        raise UserError(f'model.path={path}: no such folder; expected a Hugging Face model folder or a hub id')
    from huggingface_hub import snapshot_download  # slow to import

    try:
        return pathlib.Path(snapshot_download(path, allow_patterns=list(_FETCHED)))
    except Exception as error:  # network, names, rights: each raises its own
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'model.path={path}: no such folder, and the hub does not give it: {reason}') from None
