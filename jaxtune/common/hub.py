"""The Hugging Face hub: names of repositories, and model folders, which are fetched without pickles and code."""

import functools
import pathlib
import re
from collections.abc import Sequence

from jaxtune.common import paths
from jaxtune.common.checks import text
from jaxtune.common.jsonfile import read_object, token_ids
from jaxtune.errors import UserError, reason, shown

# A tokenizer's folder holds at least one of these.
TOKENIZER_FILES = (
    'sentencepiece.bpe.model',
    'spiece.model',
    'tokenizer.json',
    'tokenizer.model',
    'tokenizer_config.json',
    'vocab.json',
    'vocab.txt',
)

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
_SHAPES = {
    'generation_config.json': dict.fromkeys(
        ('bos_token_id', 'decoder_start_token_id', 'eos_token_id', 'pad_token_id'), token_ids
    ),
    'tokenizer_config.json': {'tokenizer_class': text},
    'special_tokens_map.json': {},
    'added_tokens.json': {},
}
_FETCHED = ('config.json', '*.safetensors', '*.safetensors.index.json', *COMPANIONS)

_ID = r'[\w-][\w.-]*(/[\w-][\w.-]*)?'


def is_id(path: str) -> bool:
    """Whether a text can be a repository's id: a name, or an owner and a name."""
    return re.fullmatch(_ID, path) is not None


def is_dataset_id(path: str) -> bool:
    """Whether a text can be a dataset's id, with a configuration and a split after colons or without."""
    return re.fullmatch(_ID + r'(:[\w.-]*){0,2}', path) is not None


def resolve(path: str, key: str = 'model.path', patterns: Sequence[str] = _FETCHED) -> pathlib.Path:
    """The folder of a model: `path` itself, or where the hub's cache keeps the id `path`.

    Args:
      path: as it was written.
      key: what names it, for the message.
      patterns: files to fetch from the hub.

    Raises:
      UserError: neither a folder nor an id that can be fetched.
    """
    folder = paths.local(path, key)
    if folder.is_dir():
        return folder
    if folder.exists() or not is_id(path):
        raise UserError(f'{key}={shown(path)[1:-1]}: no such folder; expected a Hugging Face model folder or a hub id')
    return _fetched(path, key, tuple(patterns))


@functools.cache
def _fetched(path: str, key: str, patterns: tuple[str, ...]) -> pathlib.Path:
    from huggingface_hub import errors, snapshot_download  # slow to import

    absent = f'{key}={path}: no such folder, and '
    try:
        return pathlib.Path(snapshot_download(path, allow_patterns=list(patterns)))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error.__context__ or error
        why = 'HF_HUB_OFFLINE is set' if isinstance(cause, errors.OfflineModeIsEnabled) else reason(cause)
        raise UserError(f'{absent}the hub cannot be reached ({why}), nor is it in its cache here') from None
    except errors.RepositoryNotFoundError:
        raise UserError(f'{absent}the hub has no such model, or does not show it without `hf auth login`') from None
    except Exception as error:  # rights, names, a full disk: each raises its own
        raise UserError(f'{absent}the hub does not give it: {reason(error)}') from None


def check_companions(folder: pathlib.Path) -> None:
    """Refuses JSON beside the weights that is damaged or of another shape, before anything reads it.

    Raises:
      UserError: names the file, and the field.
    """
    for name, fields in _SHAPES.items():
        if (folder / name).exists():
            read_object(folder / name, fields)
