"""What the same command, a changed recipe and stages do in a workdir."""

import json
import shutil

import pytest
from runs import metrics, recipe, write_recipe

from jaxtune import main


def run(path, workdir, *flags):
    return main.main(['jaxtune', '--config', str(path), '--workdir', str(workdir), *flags])


def result(workdir):
    return json.loads((workdir / 'result.json').read_text())


@pytest.fixture
def path(corpus, tmp_path):
    return write_recipe(tmp_path / 'recipe.py', recipe(corpus, train__steps=4, eval__every=2))


def test_files_of_the_contract(path, tmp_path, capsys):
    workdir = tmp_path / 'run'
    assert run(path, workdir) == 0
    names = {entry.name for entry in workdir.iterdir()}
    assert {'config.json', 'metrics.jsonl', 'result.json', 'checkpoints', 'export', 'report.html'} <= names
    found = result(workdir)
    assert found['task'] == 'train'
    assert found['status'] == 'done'
    assert found['step'] == 4
    for name in ('train/loss', 'train/grad_norm', 'train/learning_rate', 'train/tokens_per_second', 'train/mfu'):
        assert len(metrics(workdir, name)) == 4
    for name in ('eval/loss', 'eval/perplexity', 'eval/accuracy', 'eval/bits_per_byte'):
        assert found['metrics'][name] == metrics(workdir, name)[-1]
    assert found['metrics']['memory/peak_bytes'] > 0
    output = capsys.readouterr().out
    for words in ('8 x CPU', 'parameters', 'updates', str(workdir), 'export', 'configs/generate.py'):
        assert words in output


def test_the_same_command_again_does_nothing(path, tmp_path):
    workdir = tmp_path / 'run'
    assert run(path, workdir) == 0
    before = {
        file: file.stat().st_mtime_ns for file in workdir.rglob('*') if file.is_file() and file.name != 'config.json'
    }
    assert run(path, workdir) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_another_recipe_is_refused_with_its_keys_unless_overwritten(path, tmp_path, capsys):
    workdir = tmp_path / 'run'
    assert run(path, workdir) == 0
    losses = metrics(workdir, 'train/loss')
    capsys.readouterr()
    assert run(path, workdir, '--config.optimizer.lr=0.5', '--config.seed=3') == 2
    error = capsys.readouterr().err
    for words in ('optimizer.lr', '0.5', 'seed', '--overwrite'):
        assert words in error
    assert 'train.steps' not in error
    assert metrics(workdir, 'train/loss') == losses
    assert run(path, workdir, '--config.optimizer.lr=0.5', '--config.seed=3', '--overwrite') == 0
    assert metrics(workdir, 'train/loss') != losses


def test_steps_may_grow_and_what_changes_no_result_may_change(path, tmp_path, capsys):
    workdir = tmp_path / 'run'
    assert run(path, workdir) == 0
    assert run(path, workdir, '--config.train.steps=6', '--config.checkpoint.keep=2', '--config.mesh.fsdp=2') == 0
    assert result(workdir)['step'] == 6
    assert len(metrics(workdir, 'train/loss')) == 6
    assert run(path, workdir, '--config.train.steps=5') == 2
    assert 'train.steps' in capsys.readouterr().err


def test_stages_hand_on_what_they_made(corpus, tmp_path, capsys):
    path = tmp_path / 'recipe.py'
    path.write_text(
        f"""
from ml_collections import ConfigDict


def get_config():
    model = {{'model_type': 'qwen3', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
             'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8}}
    return ConfigDict({{
        'stages': ('words', 'first', 'more', 'sample', 'score', 'copy'),
        'seed': 5,
        'words': {{'task': 'prepare', 'data': {{'train': {str(corpus / 'train.jsonl')!r}, 'vocab_size': 300,
                  'eval_fraction': 0.1}}}},
        'first': {{'task': 'train', 'tokenizer': {{'path': '@words'}}, 'model': {{'config': model}},
                  'data': {{'train': '@words', 'eval': '@words', 'seq_len': 32}}, 'train': {{'steps': 3}}}},
        'more': {{'task': 'train', 'tokenizer': {{'path': '@words'}}, 'model': {{'path': '@first'}},
                 'data': {{'train': '@words', 'eval': '@words', 'seq_len': 32}}, 'train': {{'steps': 2}}}},
        'sample': {{'task': 'generate', 'model': {{'path': '@more'}}, 'data': {{'eval': '@words'}},
                   'generate': {{'prompt_tokens': 4, 'max_new_tokens': 5, 'samples': 3, 'prompts': 2}}}},
        'score': {{'task': 'evaluate', 'tokenizer': {{'path': '@words'}}, 'model': {{'path': '@more'}},
                  'data': {{'eval': '@words', 'seq_len': 32}}}},
        'copy': {{'task': 'export', 'model': {{'path': '@more'}}}},
    }})
"""
    )
    workdir = tmp_path / 'run'
    assert run(path, workdir, '--config.more.train.steps=4') == 0, capsys.readouterr().err
    assert result(workdir)['stages'] == ['words', 'first', 'more', 'sample', 'score', 'copy']
    assert result(workdir / 'more')['step'] == 4
    lines = [json.loads(line) for line in (workdir / 'sample' / 'samples.jsonl').read_text().splitlines()]
    assert len(lines) == 6
    assert len({line['prompt'] for line in lines}) == 2
    trained, scored = result(workdir / 'more')['metrics'], result(workdir / 'score')['metrics']
    assert scored['eval/loss'] == pytest.approx(trained['eval/loss'], rel=1e-5)
    weights = [(workdir / name / 'export' / 'model.safetensors').read_bytes() for name in ('more', 'copy')]
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert run(path, workdir, '--config.more.train.steps=4') == 0
    assert capsys.readouterr().out.count('already done') == 6
    # Some of the stages, on what was made elsewhere.
    made = [f'--config.score.{key}={workdir}/words' for key in ('data.eval', 'tokenizer.path')]
    flags = ['--config.stages=score', f'--config.score.model.path={workdir}/more', *made]
    assert run(path, tmp_path / 'score', *flags) == 0, capsys.readouterr().err
    assert result(tmp_path / 'score')['stages'] == ['score']
    assert result(tmp_path / 'score' / 'score')['metrics']['eval/loss'] == scored['eval/loss']
    # One stage made anew, on what the workdir holds of those before it.
    shutil.rmtree(workdir / 'score')
    assert run(path, workdir, '--config.stages=score') == 0, capsys.readouterr().err
    assert result(workdir / 'score')['metrics']['eval/loss'] == scored['eval/loss']
    assert result(workdir)['stages'] == ['words', 'first', 'more', 'sample', 'score']
    capsys.readouterr()
    for flags, words in (
        (['--config.stages=sing'], '--config.stages=sing: expected some of words,first,more,sample,score,copy'),
        (
            ['--config.stages=score', '--config.first.train.steps=2'],
            '--config.first.train.steps: expected a key of a stage to run, --config.stages=score',
        ),
        (['--config.stages=score'], "score.model.path='@more': expected the name of an earlier stage"),
        ([f'--config.words.data.train={workdir}/words'], 'what task=prepare made, expected what to make it of'),
    ):
        assert run(path, tmp_path / 'refused', *flags) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        assert words in error
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('torch')
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / 'copy' / 'export')
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / 'copy' / 'export')
    ids = tokenizer('the quick brown', return_tensors='pt').input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_a_stage_whose_input_was_made_anew_is_not_taken_for_done(corpus, tmp_path, capsys):
    path = tmp_path / 'recipe.py'
    path.write_text(
        f"""
from ml_collections import ConfigDict


def get_config():
    model = {{'model_type': 'gpt2', 'n_embd': 32, 'n_layer': 1, 'n_head': 2, 'n_positions': 64}}
    data = {str(corpus / 'train.jsonl')!r}
    return ConfigDict({{
        'stages': ('first', 'score'),
        'first': {{'task': 'train', 'tokenizer': {{'path': 'bytes'}}, 'model': {{'config': model}},
                  'data': {{'train': data, 'seq_len': 32}}, 'train': {{'steps': 2}}}},
        'score': {{'task': 'evaluate', 'model': {{'path': '@first'}}, 'data': {{'eval': data, 'seq_len': 32}}}},
    }})
"""
    )
    workdir = tmp_path / 'run'
    assert run(path, workdir) == 0
    before = result(workdir / 'score')['metrics']['eval/loss']
    assert run(path, workdir, '--config.first.train.steps=6') == 2
    assert 'score: holds' in (error := capsys.readouterr().err)
    assert 'stage first' in error
    assert result(workdir / 'score')['metrics']['eval/loss'] == before
    assert run(path, workdir, '--config.first.train.steps=6', '--overwrite') == 0
    assert result(workdir / 'first')['step'] == 6
    assert result(workdir / 'score')['metrics']['eval/loss'] != before


def test_an_unfinished_run_can_be_exported(path, tmp_path, corpus):
    import shutil

    from jaxtune.models.safetensors import read_header

    workdir = tmp_path / 'run'
    assert run(path, workdir) == 0
    shutil.move(workdir / 'export', tmp_path / 'kept')
    export = write_recipe(tmp_path / 'export.py', {'task': 'export', 'model.path': str(workdir)})
    assert run(export, tmp_path / 'out') == 0
    for name, entry in read_header(tmp_path / 'kept' / 'model.safetensors').items():
        assert (
            read_header(tmp_path / 'out' / 'export' / 'model.safetensors')[name].read().tobytes()
            == entry.read().tobytes()
        )


def test_data_that_changed_is_refused_by_its_name(corpus, tmp_path, capsys):
    folder = tmp_path / 'data'
    folder.mkdir()
    file, other = folder / 'a.jsonl', folder / 'b.jsonl'
    text = (corpus / 'train.jsonl').read_text()
    file.write_text(text)
    keys = recipe(corpus, train__steps=2) | {'data.train': str(folder), 'data.eval': ''}
    path, workdir = write_recipe(tmp_path / 'recipe.py', keys), tmp_path / 'run'
    assert run(path, workdir) == 0
    before = result(workdir)

    def refused(words):
        capsys.readouterr()
        assert run(path, workdir) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count('\n') == 1
        assert result(workdir) == before

    file.write_text(text.replace('a', 'b', 1))
    refused(f'data.train: {file}, which has changed since')
    file.write_text(text)  # as it was: only its time is another
    assert run(path, workdir) == 0
    other.write_text(text)
    refused(f'data.train: {other}, which is new since')
    file.unlink()
    refused(f'data.train: {file}, which is gone since; data.train: {other}, which is new since')
    assert run(path, workdir, '--overwrite') == 0
    assert run(path, workdir) == 0
