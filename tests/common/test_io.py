"""Files and folders that appear whole or not at all."""

import pytest

from jaxtune.common import io
from jaxtune.errors import UserError


def test_atomic_file(tmp_path):
    path = tmp_path / 'a.txt'
    io.write_text(path, 'é\n')
    with pytest.raises(TypeError), io.atomic_file(path, sync=False) as file:
        file.writelines([b'half', 'no bytes'])
    assert path.read_text(encoding='utf-8') == 'é\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.txt']
    with pytest.raises(FileNotFoundError):
        io.write_text(tmp_path / 'missing' / 'a.txt', '')


def test_json(tmp_path):
    path = tmp_path / 'a.json'
    assert io.read_json(path) is None
    io.write_json(path, {'a': 'é'})
    assert path.read_text(encoding='utf-8') == '{\n  "a": "é"\n}\n'
    assert io.read_json(path) == {'a': 'é'}
    path.write_text('{')
    with pytest.raises(UserError, match=r'a\.json: expected JSON'):
        io.read_json(path)
    with pytest.raises(UserError, match='cannot be read'):
        io.read_json(tmp_path)


@pytest.mark.parametrize('before', [(), ('there',), ('there', '.there.old')])
def test_replace_folder(tmp_path, before):
    for name in before:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'old').touch()
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'file').touch()
    io.replace_folder(tmp_path / 'new', tmp_path / 'there')
    assert [entry.name for entry in tmp_path.iterdir()] == ['there']
    assert [entry.name for entry in (tmp_path / 'there').iterdir()] == ['file']
