"""What lies beside a model's weights: its tokenizer with the chat template, and how it generates."""

import pathlib
import shutil
from typing import Any

from jaxtune.common import hub
from jaxtune.common.hub import TOKENIZER_FILES
from jaxtune.common.io import read_json, write_json
from jaxtune.common.jsonfile import read_object
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.chat_encoder import end_of_turn
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError
from jaxtune.models import Model

GENERATION = 'generation_config.json'
_SPECIAL = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# What `save_pretrained` may leave out of a tokenizer's own files, and what other programs read it from.
_VOCABULARIES = (*(name for name in TOKENIZER_FILES if not name.startswith('tokenizer.json')), 'merges.txt')


def generation_config(folder: str) -> dict[str, Any]:
    """The fields of a folder's generation config; {} where it has none.

    Raises:
      UserError: the file is not what it should be.
    """
    path = hub.resolve(folder) / GENERATION
    if not path.exists():
        return {}
    values = read_object(path)
    ids = values.get('eos_token_id')
    if any(type(number) is not int or number < 0 for number in _listed(ids)):
        raise UserError(f'{path}: eos_token_id={ids!r}: expected a token id, or a list of them')
    return values


def end_ids(tokenizer: Any, model: Model, folder: str) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's, and those that the model's config and generation config name.

    Args:
      tokenizer: the one that is used; where it is another than the folder's own, the folder's numbers mean nothing.
      model: the model.
      folder: where its parameters came from; '' = from scratch.

    Raises:
      UserError: the generation config is not what it should be.
    """
    ids = set(_listed(tokenizer.eos_token_id))
    if not folder or _is_own(tokenizer, folder):
        ids |= set(_listed(model.hf_config.get('eos_token_id')))
        ids |= set(_listed(generation_config(folder).get('eos_token_id'))) if folder else set()
    return tuple(sorted(ids))


def write(new: pathlib.Path, tokenizer: Any, folder: str) -> None:
    """Writes tokenizer, chat template and generation config into a model's folder, and nothing of another tokenizer.

    Args:
      new: the folder, with the generation config that its model's own config gives.
      tokenizer: the one that the model was trained with.
      folder: where the model began; '' = from scratch.

    Raises:
      UserError: that folder's generation config is not what it should be.
    """
    tokenizer.save_pretrained(new)
    source = pathlib.Path(str(tokenizer.name_or_path))
    for name in _VOCABULARIES:
        if (source / name).is_file() and not (new / name).exists():
            shutil.copyfile(source / name, new / name)
    values = read_json(new / GENERATION) | (generation_config(folder) if folder else {})
    if folder and not _is_own(tokenizer, folder):
        values |= {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name) is not None}
    end = end_of_turn(open_template('auto', tokenizer), tokenizer) if tokenizer.chat_template else None
    ends = _listed(values.get('eos_token_id'))
    if end is not None and end not in ends:
        # So that generation in `transformers` stops where the template ends an answer, too.
        values['eos_token_id'] = [*ends, end] if ends else end
    write_json(new / GENERATION, values)


def _is_own(tokenizer: Any, folder: str) -> bool:
    """Whether a tokenizer is the one in a model's folder, maybe with tokens added; also where there is none."""
    path = hub.resolve(folder)
    source = pathlib.Path(str(tokenizer.name_or_path))
    if source.is_dir() and source.resolve() == path.resolve():
        return True
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return True
    return tokenizers.extends(tokenizer, tokenizers.load(str(path)))


def _listed(ids: Any) -> list:
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
