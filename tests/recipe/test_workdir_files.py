"""A workdir whose own files hold what no run has written."""

import json

import pytest

from jaxtune.errors import UserError
from jaxtune.recipe import recipes, workdir


@pytest.mark.parametrize('name', ['config.json', workdir.INPUTS, workdir.DATA])
@pytest.mark.parametrize('value', [5, [], 'x', [1], True, {}, None])
def test_a_file_that_holds_another_value_is_named_or_made_anew(tmp_path, name, value):
    config, files = recipes.defaults(), {'data.train: a.jsonl': '1'}
    workdir.open_workdir(tmp_path, config, False, {'prepare': 'abc'}, files)
    (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    (tmp_path / 'result.json').write_text(json.dumps({'task': 'train', 'status': 'done', 'step': 3, 'metrics': {}}))
    (tmp_path / name).write_text(json.dumps(value))
    said = ''
    try:
        workdir.open_workdir(tmp_path, config, False, {'prepare': 'abc'}, files)
    except UserError as error:
        said = str(error)
    if value not in ({}, None, []):
        assert f'{tmp_path}: holds a run of another recipe' in said
        assert name in said
    workdir.open_workdir(tmp_path, config, True, {'prepare': 'abc'}, files)
    assert json.loads((tmp_path / 'config.json').read_text())['task'] == config.task
