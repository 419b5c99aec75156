"""Runs side by side, and a list of them: what differs, which is best, and how far each has come."""

import fcntl
import json
import re

import pytest
from test_report import Page, recipe, trained

from jaxtune import main as door
from jaxtune.report import compare, listing
from jaxtune.report.state import state_of


def run(folder, losses, tokens=64, samples=(), **keys):
    folder.mkdir(parents=True)
    (folder / '.jaxtune').touch()
    (folder / 'config.json').write_text(json.dumps(recipe(train__steps=40, **keys)))
    rows = [{'step': 10 * (i + 1), 'eval/loss': loss, 'train/loss': loss - 1} for i, loss in enumerate(losses)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    facts = {'command': f'python -m jaxtune.main --workdir {folder}', 'seconds': 60.0, 'tokens_per_step': tokens}
    (folder / 'run.json').write_text(json.dumps(facts))
    lines = [{'prompt': prompt, 'completion': text, 'step': 40, 'score': None} for prompt, text in samples]
    (folder / 'samples.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder


def done(folder):
    metrics = {'eval/loss': 3.0}
    (folder / 'result.json').write_text(json.dumps({'task': 'train', 'status': 'done', 'step': 40, 'metrics': metrics}))
    return folder


@pytest.fixture
def two(tmp_path):
    one = done(run(tmp_path / 'a/sft', [4, 3.5, 3, 3.2], samples=[('Why?', 'So.'), ('Who?', 'I.')], optimizer__lr=1e-3))
    other = run(tmp_path / 'b/sft', [4, 3.25], samples=[('Why?', 'Because <b>.')], optimizer__lr=2e-3, log__every=7)
    return one, other


def test_the_page_says_what_differs_and_which_is_better(two):
    runs = compare.open_runs(two)
    assert [run.name for run in runs] == ['a/sft', 'b/sft'], 'the ends that tell them apart'
    assert compare.differing_keys(runs) == [('optimizer.lr', ['0.001', '0.002'])], 'not what changes nothing'
    assert dict(compare.table(runs))['held-out loss'] == [('3.000', True), ('3.250', False)], 'the best of each'
    text = compare.page(runs)
    read = Page(text)
    assert 'What differs in their recipes: optimizer.lr.' in read.text
    assert re.search(r'b/sft\W+td\W+td\W+stopped, 20 of 40', text)
    assert 'Because <b>.' in read.text
    assert 'Who?' not in read.text, 'only one answered it'
    assert not re.search(r'https?:|@import|url\(|fetch\(|import\(', text)
    [large] = [attributes for tag, attributes in read.tags if tag == 'figure' and 'large' in attributes['class']]
    assert large
    assert read.json[0]['series'] == [[[10, 4], [20, 3.5], [30, 3], [40, 3.2]], [[10, 4], [20, 3.25]]]


def test_runs_with_other_batches_are_drawn_over_tokens(tmp_path):
    folders = run(tmp_path / 'small', [4, 3], tokens=64), run(tmp_path / 'large', [4, 3], tokens=256)
    figures = compare.charts(compare.open_runs(folders), by_tokens=True)
    assert figures[0].data['series'] == [[[640, 4], [1280, 3]], [[2560, 4], [5120, 3]]]
    assert 'Curves, by tokens' in Page(compare.page(compare.open_runs(folders))).text


def test_a_recipe_of_stages_is_the_stage_that_trained_last(tmp_path):
    for name in ('first', 'second'):
        done(run(tmp_path / 'all' / name, [4, 3 if name == 'first' else 2]))
    (tmp_path / 'all/.jaxtune').touch()
    (tmp_path / 'all/result.json').write_text(json.dumps({'status': 'done', 'stages': ['first', 'second']}))
    runs = compare.open_runs([tmp_path / 'all', done(run(tmp_path / 'one', [4, 3]))])
    assert [dict(compare.table(runs))['held-out loss'][i][0] for i in (0, 1)] == ['2.000', '3.000']
    [entry] = [entry for entry in listing.entries(tmp_path) if entry.path == 'all']
    assert (entry.what, entry.state, entry.best) == ('2 stages, causal_lm full', 'done', 'held-out loss 2.000')


def test_states(two):
    one, other = two
    assert str(state_of(one)) == 'done'
    assert str(state_of(other)) == 'stopped, 20 of 40'
    with (other / '.jaxtune').open('rb') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert str(state_of(other)) == 'running, 20 of 40'


def test_the_list(two, tmp_path, capsys):
    assert door.main(['jaxtune', 'runs', str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert 'a/sft: done' in said
    assert 'causal_lm full · held-out loss 3.250 · 1 min 00 s' in said
    assert all(len(line) <= 80 for line in said.splitlines() if '://' not in line and str(tmp_path) not in line)
    read = Page((tmp_path / 'index.html').read_text())
    assert 'stopped, 20 of 40' in read.text


def test_a_report_is_linked(tmp_path):
    (trained(tmp_path / 'with space') / 'report.html').touch()
    page = listing.page(tmp_path, listing.entries(tmp_path))
    assert 'href="with%20space/report.html"' in page


def test_the_command_writes_the_page_here(two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert door.main(['jaxtune', 'compare', *map(str, two)]) == 0
    said = capsys.readouterr().out
    assert re.search(r'held-out loss +3\.000\* +3\.250', said)
    assert 'optimizer.lr: 0.001 | 0.002' in said
    assert 'a/sft' in Page((tmp_path / 'compare.html').read_text()).text


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['compare', '{one}'], 'expected 2 to 8 workdirs, not 1'),
        (['compare', '{one}', '{one}'], 'is there twice'),
        (['compare', '{one}', '{root}'], 'expected the workdir of a run, with config.json'),
        (['compare', '{one}', '--page'], "'--page': expected nothing more. Usage: jaxtune compare WORKDIR..."),
        (['runs', '{root}/nowhere'], 'no such folder'),
        (['runs', '{one}'], 'no run below it'),
    ],
)
def test_what_is_refused(two, tmp_path, capsys, words, expected):
    words = [word.format(one=two[0], root=tmp_path) for word in words]
    assert door.main(['jaxtune', *words]) == 2
    assert expected in capsys.readouterr().err
