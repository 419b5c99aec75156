"""`report.html`: well formed, alone, escaped, with what was measured."""

import html.parser
import json
import re

import pytest

from jaxtune.common import console
from jaxtune.recipe import recipes
from jaxtune.report import charts, write_report

VOID = {'meta', 'link', 'br', 'img', 'input', 'hr'}
EVIL = '<script>alert("x")</script> & </pre>'


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced; collects the tags and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.json = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ('script', {'type': 'application/json'}) and self.open[-1] == 'script':
            self.json.append(json.loads(data))
        elif not self.open or self.open[-1] not in ('script', 'style'):
            self.words.append(data)

    @property
    def text(self):
        return ' '.join(''.join(self.words).split())


def recipe(task='train', **keys):
    config = recipes.defaults()
    recipes.apply_overrides(config, {'task': task, **{name.replace('__', '.'): value for name, value in keys.items()}})
    return json.loads(config.to_json())


def trained(folder, updates=1200):
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(recipe(optimizer__lr=0.125, data__train=EVIL)))
    with (folder / 'metrics.jsonl').open('w') as file:
        for step in range(1, updates + 1):
            row = {'step': step, 'train/loss': 9.0 / step + 2, 'train/mfu': 0.5, 'memory/peak_bytes': 1 << 30}
            file.write(json.dumps(row) + '\n')
            if step % 400 == 0:
                row = {'step': step, 'eval/loss': 2.25 if step == 800 else 2.5}
                file.write(json.dumps(row) + '\n')
        file.write(json.dumps({'step': updates, 'train/grad_norm': None}) + '\n{"step": 99')
    metrics = {'eval/loss': 2.5, 'eval/perplexity': 12.18, 'eval/bits_per_byte': 1.5, 'x/gzip_bits_per_byte': 2.0}
    result = {'task': 'train', 'status': 'done', 'step': updates, 'metrics': metrics}
    (folder / 'result.json').write_text(json.dumps(result))
    run = {'command': 'python -m jaxtune.main --config a.py', 'seconds': 100.0, 'phases': {'step': 75.0, 'odd': 5.0}}
    (folder / 'run.json').write_text(json.dumps(run))
    return folder


def page(folder):
    write_report(folder)
    text = (folder / 'report.html').read_text()
    return Page(text), text


def test_a_training_run(tmp_path):
    read, text = page(trained(tmp_path / 'run'))
    for part in ('2.500', '12.18', '1.500', '25 % below the 2.000 of gzip -9', '1 min 40 s', 'best 2.250 at 800'):
        assert part in read.text, part
    assert re.search(r'optimizer.lr\W+code\W+td\W+td\W+code\W+0\.125\b', text)
    assert 'python -m jaxtune.main --config a.py' in read.text
    assert 'training steps 1 min 15 s 75 %' in read.text
    assert 'everything else 20 s 20 %' in read.text


def test_nothing_is_fetched(tmp_path):
    read, text = page(trained(tmp_path / 'run'))
    for tag, attributes in read.tags:
        for name in ('src', 'href', 'srcset', 'action', 'data', 'xlink:href'):
            assert attributes.get(name, '#').startswith(('#', 'data:,')), (tag, attributes)
    assert not re.search(r'https?:|@import|url\(|fetch\(|import\(', text)


def test_the_curves_are_there_and_not_too_long(tmp_path):
    read, _ = page(trained(tmp_path / 'run'))
    drawn = [attributes['d'] for tag, attributes in read.tags if tag == 'path' and 'line' in attributes['class']]
    counts = [len(re.findall(r'[ML]', path)) for path in drawn]
    assert len(counts) == 3, 'loss, MFU, memory'
    assert all(100 < count <= 500 for count in counts)
    dots = [attributes['d'] for tag, attributes in read.tags if tag == 'path' and attributes['class'] == 'dot eval']
    assert dots[0].count('M') == 3, 'an evaluation each'
    loss = read.json[0]['series']
    assert loss[1] == [[400, 2.5], [800, 2.25], [1200, 2.5]]
    assert loss[0][-1] == pytest.approx([1200, 9 / 1200 + 2], rel=1e-4)


def test_the_loss_by_position_is_a_curve_over_positions(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(recipe('evaluate')))
    losses = {(0, 9): 1.5, (10, 19): 2.0, (20, 29): 4.0}
    row = {f'eval/loss_by_position/{low}-{high}': loss for (low, high), loss in losses.items()}
    row |= {f'eval/tokens_by_position/{low}-{high}': 7 for low, high in losses}
    (folder / 'metrics.jsonl').write_text(json.dumps({'step': 0, 'eval/loss': 2.5, **row}) + '\n')
    read, _ = page(folder)
    assert [data['series'] for data in read.json] == [[[[4.5, 1.5], [14.5, 2.0], [24.5, 4.0]]]]
    label = 'Held-out loss by position in a document, nats a token: held out from 1.500 to 4.000'
    assert [attributes['aria-label'] for tag, attributes in read.tags if tag == 'svg'] == [label]
    # Of two evaluations the newest stands beside the first one.
    with (folder / 'metrics.jsonl').open('a') as file:
        file.write(json.dumps({'step': 5, **{name: value - 1 for name, value in row.items()}}) + '\n')
    read, _ = page(folder)
    assert [[y for _, y in curve] for curve in read.json[-1]['series']] == [[0.5, 1.0, 3.0], [1.5, 2.0, 4.0]]


def test_what_people_wrote_is_text(tmp_path):
    folder = tmp_path / '<b>run'
    trained(folder)
    with (folder / 'samples.jsonl').open('w') as file:
        file.write(json.dumps({'prompt': EVIL, 'completion': 'and ' + EVIL, 'score': 0.5, 'step': 0}) + '\n')
        chat = [{'role': 'user', 'content': 'hi <i>'}]
        file.write(json.dumps({'prompt': chat, 'completion': None, 'score': None, 'step': 0}) + '\n')
    read, text = page(folder)
    assert 'alert("x")</script>' not in text
    assert f'{EVIL}and {EVIL}' in read.text
    assert 'user: hi <i>' in read.text
    assert 'score 0.5000' in read.text
    assert len([tag for tag, _ in read.tags if tag in ('b', 'i')]) > 0
    assert '<b>run' not in text


def test_answers_before_training_stand_beside_those_after(tmp_path):
    trained(tmp_path / 'run')
    with (tmp_path / 'run' / 'samples.jsonl').open('w') as file:
        for step, answer in ((0, 'gibberish'), (1200, 'an answer')):
            line = {'prompt': 'ask', 'completion': answer, 'score': 0.0, 'step': step, 'reference': 'the truth'}
            file.write(json.dumps(line) + '\n')
    read, _ = page(tmp_path / 'run')
    after = read.text[read.text.index('Before training and after') :]
    assert after.index('gibberish') < after.index('an answer') < after.index('the truth')


def test_a_few_prompts_are_followed_through_training(tmp_path):
    trained(tmp_path / 'run')
    with (tmp_path / 'run' / 'samples.jsonl').open('w') as file:
        for step in range(0, 1200, 100):
            for prompt in range(6):
                line = {
                    'prompt': f'ask {prompt} {EVIL}',
                    'completion': f'answer {prompt} of {step}',
                    'score': step / 100,
                }
                file.write(json.dumps(line | {'step': step}) + '\n')
    read, _ = page(tmp_path / 'run')
    part = read.text[
        read.text.index('The same prompts through training') : read.text.index('Before training and after')
    ]
    assert re.findall(r'step ([\d,]+), score ([\d.]+)', part)[:5] == [
        ('0', '0'), ('300', '3.000'), ('600', '6.000'), ('800', '8.000'), ('1,100', '11.00'),
    ]  # fmt: skip
    assert [f'answer {prompt} of 600' in part for prompt in range(6)] == [True] * 4 + [False] * 2
    # Two steps stand beside each other as before and after.
    lines = (tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()
    (tmp_path / 'run' / 'samples.jsonl').write_text('\n'.join(lines[:12]) + '\n')
    assert 'The same prompts through training' not in page(tmp_path / 'run')[0].text


def test_a_run_that_learnt_from_rewards(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(recipe('ppo') | {'rl': {'reward': 'mine:right', 'rollouts': 64}}))
    with (tmp_path / 'metrics.jsonl').open('w') as file:
        for step in range(5):
            file.write(json.dumps({'step': step, 'eval/reward': 0.5 + step}) + '\n')
            line = {'ppo/reward': step / 4, 'ppo/kl': 3.25, 'ppo/ended': 0.75, 'train/loss': -0.5 + step}
            line |= {'ppo/reward/math': step / 8, 'ppo/occupancy': 0.875, 'ppo/clip_fraction': 0.125}
            file.write(json.dumps({'step': step, **line}) + '\n')
    read, _ = page(tmp_path)
    for part in ('Held-out reward', '4.500', '0.5000 at step 0', '3.250 nats', 'by PPO for', 'scored by mine:right'):
        assert part in read.text, part
    # Losses of a policy are of no unit, and may be below 0: no main chart.
    assert 'nats a' not in read.text
    charts = [[curve[-1][1] for curve in figure['series']] for figure in read.json]
    assert charts[0] == [4.5, 1.0]
    assert [3.5] in charts
    assert 'Answers that came to an end' in read.text
    places = [read.text.index(title) for title in ('Reward: math', 'Answers that came', 'Slots that wrote a token')]
    assert places == sorted(places)
    assert 'Slots that wrote 8' in read.text


def test_what_a_plug_in_brings(tmp_path):
    """An algorithm of the user's own: its metrics have its name, and the titles that `run.json` gives."""
    (tmp_path / 'config.json').write_text(json.dumps(recipe() | {'task': 'mine.module:BEST'}))
    (tmp_path / 'run.json').write_text(json.dumps({'titles': {'surprise': 'How far it strays'}}))
    with (tmp_path / 'metrics.jsonl').open('w') as file:
        for step in range(3):
            file.write(json.dumps({'step': step, 'best/reward': step / 4, 'best/surprise': 2.0 + step}) + '\n')
    read, _ = page(tmp_path)
    assert 'How far it strays' in read.text


def test_a_workdir_of_stages(tmp_path):
    trained(tmp_path / 'zeta')
    (tmp_path / 'alpha').mkdir()
    (tmp_path / 'alpha' / 'config.json').write_text(json.dumps(recipe('generate')))
    (tmp_path / 'alpha' / 'samples.jsonl').write_text(json.dumps({'prompt': 'once', 'completion': ' upon'}) + '\n')
    (tmp_path / 'data').mkdir()
    metrics = {'data/documents': 1234, 'data/bytes_per_token': 4.25, 'data/eval_gzip_bits_per_byte': 2.125}
    result = {'task': 'prepare', 'status': 'done', 'step': 0, 'metrics': metrics}
    (tmp_path / 'data' / 'result.json').write_text(json.dumps(result))
    root = {'task': 'stages', 'status': 'done', 'step': 0, 'metrics': {}, 'stages': ['data', 'zeta', 'alpha']}
    (tmp_path / 'result.json').write_text(json.dumps(root))
    read, _ = page(tmp_path)
    ids = [attributes['id'] for tag, attributes in read.tags if tag == 'section' and 'id' in attributes]
    assert ids == ['data', 'zeta', 'alpha']
    for part in ('1.23K', '4.25', '2.125', 'best 2.250', 'once upon', 'stage 2 of 3 · train'):
        assert part in read.text, part


@pytest.mark.parametrize('task', ['train', 'ppo', 'grpo', 'generate', 'evaluate', 'prepare', 'compile'])
def test_missing_files_are_fine(tmp_path, task):
    read, _ = page(tmp_path)
    assert 'not finished' in read.text
    (tmp_path / 'config.json').write_text(json.dumps(recipe(task)))
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "train/loss": 2.0}\n')
    read, _ = page(tmp_path)
    assert task in read.text


def test_other_processes_write_nothing(tmp_path):
    console.set_primary(False)
    try:
        write_report(tmp_path)
    finally:
        console.set_primary(True)
    assert not (tmp_path / 'report.html').exists()


def test_downsampling_keeps_spikes_and_ends():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[4400] = (4400.0, -50.0)
    kept = charts.downsample(points)
    assert len(kept) <= charts.MOST_POINTS
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {points[4321], points[4400]} <= set(kept)
    assert kept == sorted(kept)


def test_smoothing_neither_lags_nor_shifts():
    line = [(float(x), 3.0 * x) for x in range(200)]
    assert [y for _, y in charts.smooth(line)] == pytest.approx([y for _, y in line])
    noise = [(float(x), float(x % 2)) for x in range(200)]
    assert [y for _, y in charts.smooth(noise)][50:150] == pytest.approx([0.5] * 100, abs=0.1)


def test_ticks_are_round():
    assert charts.ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert charts.ticks(2.31, 9.8) == [4.0, 6.0, 8.0]
    assert charts.ticks(3.0, 3.0) == [3.0]
