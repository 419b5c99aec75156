"""How the Hugging Face hub names things: repositories, and the files of a tokenizer."""

import re

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

_ID = r'[\w-][\w.-]*(/[\w-][\w.-]*)?'


def is_id(path: str) -> bool:
    """Whether a text can be a repository's id: a name, or an owner and a name."""
    return re.fullmatch(_ID, path) is not None


def is_dataset_id(path: str) -> bool:
    """Whether a text can be a dataset's id, with a configuration and a split after colons or without."""
    return re.fullmatch(_ID + r'(:[\w.-]*){0,2}', path) is not None
