"""What is looked at before anything is loaded."""

from jaxtune.recipe import recipes
from jaxtune.tasks import present


def test_the_files_of_a_prepared_folder_are_no_records(tmp_path, capsys):
    for name in ('train/meta.json', 'train/tokens.bin', 'report.html'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{}')
    config = recipes.defaults()
    recipes.apply_overrides(config, {'data.train': str(tmp_path)})
    present.check_sources(config, 'data.train')
    assert 'left out' not in ''.join(capsys.readouterr())
