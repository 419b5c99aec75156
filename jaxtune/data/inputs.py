"""Fingerprints of the data that a run reads, so that it continues with the data that it began with or not at all."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxtune.common import sources
from jaxtune.data.cache import prepared_tokens
from jaxtune.data.records import find_files
from jaxtune.errors import UserError

KEYS = ('data.train', 'data.eval', 'sft.demonstrations')  # of a recipe, that name data
# Bytes that are read of all files of a key: of larger ones, pieces from their beginning to their end.
_BUDGET = 256 << 20
_PIECES = 16


def fingerprints(values: Mapping[str, Any]) -> dict[str, str]:
    """A fingerprint of the content of each file that data keys name, by path or sources: `{'KEY: FILE': fingerprint}`.

    Nothing for what another stage makes, for datasets of the hub, and for what is not there: reading it says so.
    """
    fingerprints = {}
    for key, path in ((key, source.path) for key, value in values.items() for source in sources.read(value)):
        if path.startswith('@') or path in ('python-stdlib', sources.AUTO):
            continue
        try:
            folder = prepared_tokens(path, key) if key != 'sft.demonstrations' else None
            files = sorted(folder.iterdir()) if folder else find_files(path, key) or []
            share = max(1 << 16, _BUDGET // max(1, len(files)))
            fingerprints |= {f'{key}: {file}': _fingerprint(file, share) for file in files}
        except (UserError, OSError):
            continue
    return fingerprints


def _fingerprint(file: pathlib.Path, share: int) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256()
    with open(file, 'rb') as stream:
        if size <= share:
            starts, length = [0], size
        else:
            length = share // _PIECES
            starts = [(size - length) * number // (_PIECES - 1) for number in range(_PIECES)]
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(length))
    return f'{size} {digest.hexdigest()[:32]}'
