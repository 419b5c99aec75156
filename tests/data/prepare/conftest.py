"""Recipes of preparation run in a folder of their own."""

import hashlib

import pytest

from jaxtune.recipe import workdir as workdirs
from jaxtune.recipe.flags import Command
from jaxtune.tasks import prepare

for _package in ('datatrove', 'ftfy', 'trafilatura', 'warcio'):
    pytest.importorskip(_package, reason="needs the extra [data]: pip install 'jaxtune[data]'")

TIMED = ('.jaxtune', 'run.json', 'report.html', 'config.json')  # they say when, how long, and with how many workers


@pytest.fixture
def prepared(recipe, tmp_path):
    """`prepared('name', {'data.sources': ...})`: the content of `result.json`."""

    def make(name, changes):
        config = recipe({'task': 'prepare', 'data.vocab_size': 400, 'data.workers': 1, **changes})
        (tmp_path / name).mkdir(exist_ok=True)
        workdirs.open_workdir(tmp_path / name, config, False)
        command = Command('recipe.py', tmp_path / name, False, {'': config}, ('jaxtune',))
        return prepare.run(config, tmp_path / name, command)

    return make


def contents(folder):
    """Every file that a run leaves, but those that say when: path -> hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file() and path.name not in TIMED
    }
