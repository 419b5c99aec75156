"""Whose a workdir is: a folder of somebody else's is left alone, a second process is refused, nothing is mixed up."""

import errno
import fcntl
import json
import os
import shutil

import pytest
from runs import full_config, recipe

from jaxtune import main
from jaxtune.errors import UserError
from jaxtune.recipe import ownership, workdir
from jaxtune.report import NAME as REPORT

TASKS = ('prepare', 'train', 'ppo', 'grpo', 'evaluate', 'generate', 'export', 'compile')


def tree(folder):
    """Every path below a folder with its bytes, links as what they point to."""
    found = {}
    for path in sorted(folder.rglob('*')):
        found[str(path.relative_to(folder))] = (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


@pytest.fixture
def write(tmp_path):
    """Writes a recipe of one line a key; returns the command's words for it."""

    def write(task, **keys):
        path = tmp_path / 'recipe.py'
        lines = [f'    config.{name.replace("__", ".")} = {value!r}' for name, value in keys.items()]
        groups = sorted({name.split('__')[0] for name in keys if '__' in name})
        made = [f'    config.{group} = ConfigDict()' for group in groups]
        head = [
            'from ml_collections import ConfigDict',
            'def get_config():',
            f'    config = ConfigDict({{"task": {task!r}}})',
        ]
        path.write_text('\n'.join([*head, *made, *lines, '    return config', '']))
        return ['jaxtune', '--config', str(path)]

    return write


FOREIGN = {
    'model': ('config.json', '{"model_type": "gpt2", "n_layer": 2}'),
    'nested': ('config.json', '{"model_type": "qwen3", "rope_parameters": {"rope_theta": 10000.0}}'),
    'weights': ('model-00001-of-00002.safetensors', 'x'),
    'adapter': ('adapter_config.json', '{}'),
    'tokenizer': ('tokenizer.json', '{}'),
    'records': ('train.jsonl', '{"text": "a"}'),
    'results': ('result.json', '{"status": "done"}'),
    'repository': ('.git/HEAD', 'ref: refs/heads/main'),
    'broken': ('config.json', '{'),
}


@pytest.mark.parametrize('kind', FOREIGN)
@pytest.mark.parametrize('flags', [[], ['--overwrite']], ids=['', 'overwrite'])
def test_a_folder_of_something_else_is_refused_and_untouched(write, tmp_path, capsys, kind, flags):
    name, content = FOREIGN[kind]
    folder = tmp_path / 'theirs'
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content)
    (folder / 'README.md').write_text('mine')
    before = tree(folder)
    assert main.main([*write('train'), '--workdir', str(folder), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert f'--workdir={folder}: holds {name.split("/")[0]}' in error
    assert '--overwrite' not in error
    assert tree(folder) == before


@pytest.mark.parametrize('task', TASKS)
def test_a_second_process_is_refused_in_every_task(write, tmp_path, capsys, task):
    folder = tmp_path / 'run'
    folder.mkdir()
    with open(folder / ownership.MARK, 'w') as held:
        held.write('process 7 on elsewhere')
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)  # as a lock of another open file, it keeps this process out too
        assert main.main([*write(task), '--workdir', str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert 'in use by another run (process 7 on elsewhere)' in error
    assert sorted(tree(folder)) == [ownership.MARK]


def test_stages_keep_a_second_process_out_of_the_folder_that_holds_them(tmp_path, capsys):
    path = tmp_path / 'recipe.py'
    path.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n'
        "    return ConfigDict({'stages': ('one',), 'one': {'task': 'prepare'}})\n"
    )
    words = ['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]
    with ownership.locked(tmp_path / 'run'):
        assert main.main(words) == 2
        assert 'in use by another run' in capsys.readouterr().err
    # A run without stages is not emptied for one that has some.
    (tmp_path / 'run' / 'config.json').write_text(full_config({}).to_json())
    assert main.main(words) == 2
    assert 'a run of a recipe without stages' in capsys.readouterr().err


@pytest.fixture
def opened(corpus, tmp_path):
    """Opens `tmp_path/run` for a recipe with changes; and the recipe without."""

    def opened(overwrite=False, inputs=None, **changes):
        with ownership.locked(tmp_path / 'run'):
            return workdir.open_workdir(tmp_path / 'run', full_config(recipe(corpus, **changes)), overwrite, inputs)

    return opened


def saved(run, step, signature):
    """Stands for a checkpoint."""
    (run / 'checkpoints' / str(step)).mkdir(parents=True)
    (run / 'checkpoints' / str(step) / workdir.SIGNATURE).write_text(json.dumps(signature | {'files': {}}))


def test_overwriting_leaves_what_a_person_put_there(opened, tmp_path):
    run, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'
    opened()
    elsewhere.mkdir()
    saved(elsewhere, 7, {})
    (run / 'checkpoints').symlink_to(elsewhere / 'checkpoints')
    (run / 'result.json').symlink_to(elsewhere / 'old.json')
    for name in (
        'export/model.safetensors',
        'cache/a/meta.json',
        'base/config.json',
        '.metrics.jsonl.abcdefgh',
        'run.json',
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text('ours')
    mine = {'notes.md': 'a', 'plots/loss.png': 'b', '.hidden': 'c', 'export.zip': 'd', 'config.json.bak': 'e'}
    for name, text in mine.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    before = tree(elsewhere)
    with pytest.raises(UserError, match=r'what differs: .*seed \(0 there, 1 here\)'):
        opened(seed=1)
    opened(overwrite=True, seed=1)
    left = {name: content for name, content in tree(run).items() if content is not None}
    assert left.pop('config.json')
    assert left.pop(ownership.MARK)
    assert left == {name: text.encode() for name, text in mine.items()}
    assert tree(elsewhere) == before


def test_checkpoints_go_first_and_the_recipe_last(opened, tmp_path, monkeypatch):
    opened()
    for name in ('checkpoints', 'export', 'result.json', 'metrics.jsonl'):
        (tmp_path / 'run' / name).touch()
    order = []
    monkeypatch.setattr(ownership, '_remove', lambda path: order.append(path.name))
    ownership.empty(tmp_path / 'run')
    assert (order[0], order[-1]) == ('checkpoints', 'config.json')


def test_checkpoints_of_another_recipe_are_never_gone_on_from(opened, tmp_path):
    run = tmp_path / 'run'
    opened()
    own = workdir.stored_signature(run)
    saved(run, 7, own)
    # The recipe is lost: the checkpoints say whose they are.
    (run / 'config.json').unlink()
    with pytest.raises(UserError, match=r'checkpoints/7 \(saved by another recipe\)'):
        opened(seed=1)
    with pytest.raises(UserError, match=r'checkpoints/7 \(saved by another recipe\)'):
        opened(inputs={'first': 'of another result'})
    with pytest.raises(UserError, match=r'train.steps \(20 in checkpoints/7, 5 here\)'):
        opened(train__steps=5)
    assert opened(train__steps=25, mesh__fsdp=2, log__every=3) is None
    assert ownership.steps(run) == [7]
    # A recipe lies there, and checkpoints of another one were put beside it.
    saved(run, 9, own | {'recipe': 'another'})
    with pytest.raises(UserError, match=r'checkpoints/9 \(saved by another recipe\)'):
        opened(train__steps=25)
    shutil.rmtree(run / 'checkpoints')
    # Neither recipe nor signature: nobody knows.
    saved(run, 7, {})
    assert opened(train__steps=25) is None
    (run / 'config.json').unlink()
    with pytest.raises(UserError, match=r'checkpoints/7 \(of a recipe that is not there any more\)'):
        opened(train__steps=25)
    opened(overwrite=True, train__steps=25)
    assert ownership.steps(run) == []


def test_where_nothing_was_made_another_recipe_may_begin(opened, write, tmp_path, capsys):
    run = tmp_path / 'run'
    opened()
    (run / 'cache').mkdir()
    (run / 'metrics.jsonl').touch()
    assert opened(seed=1) is None
    assert json.loads((run / 'config.json').read_text())['seed'] == 1
    assert sorted(tree(run)) == [ownership.MARK, 'cache', 'config.json']
    # Refused by the command, corrected, and run again.
    shutil.rmtree(run)
    for word in ('chat_trian', 'chat_train'):
        command = [*write('prepare', data__train=str(tmp_path / f'{word}.jsonl')), '--workdir', str(run)]
        assert main.main(command) == 2
        assert f'{word}.jsonl' in (error := capsys.readouterr().err)
        assert '--overwrite' not in error
    # Work that is half done is not thrown away for a changed key.
    opened()
    (run / 'work' / 'logs' / 'collect' / 'completions').mkdir(parents=True)
    (run / 'work' / 'logs' / 'collect' / 'completions' / '00000').touch()
    with pytest.raises(UserError, match='seed'):
        opened(seed=2)


def test_a_longer_run_is_not_done_by_the_result_of_a_shorter_one(opened, tmp_path):
    opened()
    result = workdir.write_result(tmp_path / 'run', 'train', 20, {'eval/loss': 1.0})
    assert opened() == result
    assert opened(train__steps=30) is None
    # Killed here, the same command must not find the shorter run's result.
    assert opened(train__steps=30) is None


def test_numbers_that_json_does_not_have_are_null_in_a_result(tmp_path):
    workdir.write_result(tmp_path, 'evaluate', 0, {'eval/loss': float('nan'), 'eval/perplexity': float('inf'), 'a': 1})
    constants = []
    found = json.loads((tmp_path / 'result.json').read_text(), parse_constant=constants.append)
    assert found['metrics'] == {'eval/loss': None, 'eval/perplexity': None, 'a': 1}
    assert not constants


def test_the_result_comes_last_and_a_missing_report_is_made_again(write, corpus, tmp_path, capsys):
    run = tmp_path / 'run'
    words = [*write('prepare', data__train=str(corpus / 'train.jsonl'), data__vocab_size=300), '--workdir', str(run)]
    assert main.main(words) == 0
    assert (run / 'result.json').stat().st_mtime_ns >= (run / REPORT).stat().st_mtime_ns
    page, result = (run / REPORT).read_text(), (run / 'result.json').read_bytes()
    (run / REPORT).unlink()
    capsys.readouterr()
    assert main.main(words) == 0
    assert 'already done' in capsys.readouterr().out
    assert (run / REPORT).read_text() == page
    assert (run / 'result.json').read_bytes() == result


def run_in(run, act):
    """Runs `act` as a task's run in a workdir."""
    with ownership.locked(run), workdir.working(run):
        act()


@pytest.mark.parametrize('fails', [True, False])
def test_a_workdir_that_is_removed_under_a_run_is_said(tmp_path, fails):
    run = tmp_path / 'run'

    def act():
        shutil.rmtree(run)
        if fails:
            workdir.write_result(run, 'train', 1, {})
        run.mkdir()  # as libraries do, without a word

    with pytest.raises(UserError, match='was removed while the run was going'):
        run_in(run, act)


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'file'),
        ValueError('RESOURCE_EXHAUSTED: Error writing "x" in OCDBT database: No space left on device'),
        OSError('1024 requested and 0 written'),
        ExceptionGroup('several', [RuntimeError('a'), OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))]),
    ],
)
def test_a_full_disk_is_one_line_whoever_says_so(tmp_path, error):
    run = tmp_path / 'run'

    def act():
        (run / '.report.html.abcdefgh').touch()
        raise RuntimeError('saving failed') from error

    with pytest.raises(UserError, match='expected free space; the same command continues'):
        run_in(run, act)
    assert sorted(tree(run)) == [ownership.MARK]

    def fail():
        raise RuntimeError('another') from KeyError('x')

    with pytest.raises(RuntimeError, match='another'):
        run_in(run, fail)
