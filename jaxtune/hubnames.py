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


def is_id(path: str) -> bool:
    """Whether a text can be a repository's id: a name, or an owner and a name."""
    return re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', path) is not None
