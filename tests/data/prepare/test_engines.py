"""The same recipe on a cluster: the bytes of a local run from Ray, the scripts of every phase for Slurm."""

import json
import re

import pytest

from jaxtune.data.prepare import sources
from jaxtune.errors import UserError

from .conftest import contents
from .corpus import prose


@pytest.fixture
def changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, '_TASK', 20_000)
    monkeypatch.setattr(sources, '_CUT', 10_000)
    rows = [json.dumps({'text': prose(150, i)}) + '\n' for i in [*range(30), 3]]
    (tmp_path / 'in.jsonl').write_text(''.join(rows))
    return {'data.train': str(tmp_path / 'in.jsonl'), 'data.steps.clean.unicode': True}


def test_ray(changes, prepared, tmp_path):
    ray = pytest.importorskip('ray', reason="needs ray: pip install 'jaxtune[ray]'")
    prepared('local', changes)
    cluster = {'data.engine': 'ray', 'data.workers': 2}
    try:
        prepared('ray', changes | cluster)
        # What a task refuses there is said here, as from a local run.
        broken = changes | {'data.train': str(tmp_path / 'broken.jsonl'), 'data.steps.limits.broken': 5}
        (tmp_path / 'broken.jsonl').write_text('not json\n' * 200)
        said = []
        for name, engine in (('a', {}), ('b', cluster)):
            with pytest.raises(UserError, match=r'limits\.broken=5') as caught:
                prepared(name, broken | engine)
            said.append(str(caught.value))
        assert said[0] == said[1]
    finally:
        ray.shutdown()
    assert len(contents(tmp_path / 'local')) > 8
    assert contents(tmp_path / 'ray') == contents(tmp_path / 'local')


@pytest.mark.parametrize(
    ('death', 'said'), [('os.kill(os.getpid(), 9)', 'was killed by SIGKILL'), ('os._exit(0)', 'left with status 0')]
)
def test_a_worker_that_dies(changes, prepared, tmp_path, monkeypatch, death, said):
    """It fails its phase with a line that names it, whatever ended it, and the same command goes on."""
    wait = tmp_path / 'wait'
    module = f'mortal_{len(said)}'
    (tmp_path / f'{module}.py').write_text(
        f'import os\n\ndef keep(text, metadata):\n    if os.path.exists({str(wait)!r}):\n        {death}\n'
        '    return text\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    changes |= {'data.steps.filter.custom': f'{module}:keep', 'data.workers': 2}
    wait.touch()
    with pytest.raises(UserError, match=rf'^collect: the worker of task \d+ {said}.* The same command continues$'):
        prepared('a', changes)
    assert not (tmp_path / 'a' / 'result.json').exists()
    wait.unlink()
    prepared('a', changes)
    prepared('b', changes | {'data.workers': 1})
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_slurm_dry_run(changes, prepared, tmp_path, capsys):
    changes = {**changes, 'data.engine': 'slurm', 'data.steps.dedup.near': 0.8}
    with pytest.raises(UserError, match=r"data\.slurm\.partition='': expected the name of a partition"):
        prepared('a', changes)
    result = prepared('a', {**changes, 'data.slurm.partition': 'cpu', 'data.slurm.dry_run': True, 'data.workers': 7})
    assert result['status'] == 'submitted'
    assert not (tmp_path / 'a' / 'result.json').exists()
    said = capsys.readouterr().out
    names = re.findall(r'--job-name=jaxtune-([\w-]+)', said)
    assert names == ['collect', 'near-duplicates', 'decide', 'tokenizer', 'tokenise', 'build']
    assert re.findall(r'--dependency=afterok:(\w+)', said) == ['JOB1', 'JOB2', 'JOB3', 'JOB4', 'JOB5']
    arrays = re.findall(r'--array=0-(\d+)%7', said)
    assert arrays[0] == arrays[4] != '0'
    assert said.count('launch_pickled_pipeline') == 6
    assert 'nothing was submitted' in said
    # What was planned for the cluster can be done here.
    assert prepared('a', {**changes, 'data.engine': 'local', 'data.workers': 1})['status'] == 'done'
