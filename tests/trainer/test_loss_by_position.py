"""`eval.by_position`: the parts of one loss, the same on any mesh and packed or not, in metrics and report."""

import json

import pytest
from runs import full_config, metrics, recipe, train, write_recipe

from jaxtune import main, report
from jaxtune.errors import UserError
from jaxtune.metrics.names import positions_of
from jaxtune.objectives import by_position as parts
from jaxtune.tasks import setup

BUCKETS = 4


def by_position(values):
    """Bucket -> (loss, tokens)."""
    found = {}
    for name, value in values.items():
        if bounds := positions_of(name):
            found.setdefault(bounds, {})[name.split('/')[1].split('_')[0]] = value
    return {bounds: (values.get('loss'), values['tokens']) for bounds, values in found.items()}


def evaluated(folder, keys, name, **changes):
    path = write_recipe(folder / 'recipe.py', keys | {key.replace('__', '.'): value for key, value in changes.items()})
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(folder / name), '--overwrite']) == 0
    return json.loads((folder / name / 'result.json').read_text())['metrics']


def assert_is_the_whole(values):
    found = by_position(values)
    assert sum(tokens for _, tokens in found.values()) == values['eval/tokens']
    total = sum(loss * tokens for loss, tokens in found.values() if tokens)
    assert total / values['eval/tokens'] == pytest.approx(values['eval/loss'], rel=1e-6)


def test_training_reports_it_at_every_evaluation_alike_on_any_mesh(corpus, tmp_path, monkeypatch):
    keys, traces, sums = recipe(corpus, train__steps=4, eval__every=2, eval__by_position=BUCKETS), [], parts.sums

    def counted(batch, logprobs):
        traces.append(logprobs.shape)
        return sums(batch, logprobs)

    monkeypatch.setattr(parts, 'sums', counted)
    one = train(keys, tmp_path / 'one')['metrics']
    assert traces == [(16, 64)]  # compiled once for all evaluations
    assert list(by_position(one)) == [(0, 15), (16, 31), (32, 47), (48, 63)]
    assert_is_the_whole(one)
    for name, (loss, tokens) in by_position(one).items():
        low, high = name
        assert len(metrics(tmp_path / 'one', f'eval/loss_by_position/{low}-{high}')) == 2
        assert tokens
        assert loss
    many = train(keys, tmp_path / 'many', (2, 2, 1, 2))['metrics']
    for (loss, tokens), (other, others_tokens) in zip(
        by_position(one).values(), by_position(many).values(), strict=True
    ):
        assert tokens == others_tokens
        assert other == pytest.approx(loss, abs=1e-4)
    # What is not asked for is not there, and changes nothing.
    plain = train(recipe(corpus, train__steps=4, eval__every=2), tmp_path / 'plain')['metrics']
    assert by_position(plain) == {}
    assert plain['eval/loss'] == pytest.approx(one['eval/loss'], rel=1e-5)


def test_neighbours_in_a_row_and_a_small_last_batch_change_nothing(model, corpus, tmp_path):
    keys = {'task': 'evaluate', 'model.path': str(model), 'data.eval': str(corpus / 'eval.jsonl')}
    keys |= {'data.seq_len': 100, 'train.batch_size': 8, 'eval.by_position': BUCKETS}
    packed = evaluated(tmp_path, keys, 'packed')
    assert_is_the_whole(packed)
    apart = evaluated(tmp_path, keys, 'apart', data__packing=False, train__batch_size=16)
    for one, other in zip(by_position(packed).values(), by_position(apart).values(), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_of_conversations_only_answers_count(model, corpus, tmp_path):
    keys = {'task': 'evaluate', 'model.path': str(model), 'data.eval': str(corpus / 'eval.jsonl'), 'objective': 'sft'}
    keys |= {'data.seq_len': 96, 'train.batch_size': 8, 'eval.by_position': BUCKETS, 'data.format': 'prompt'}
    values = evaluated(tmp_path, keys, 'run')
    assert_is_the_whole(values)
    assert 0 <= values['eval/exact_match'] <= 1


def test_the_report_draws_the_first_and_the_newest(corpus, tmp_path):
    train(recipe(corpus, train__steps=4, eval__every=2, eval__by_position=BUCKETS), tmp_path / 'run')
    page = report.render(tmp_path / 'run')
    assert 'Held-out loss by position in a document, nats a token' in page
    assert 'update 2 from' in page
    assert 'update 4 from' in page
    assert '<b>0-15</b>' not in page  # no chart a bucket


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'objective': 'dpo'}, r'eval\.by_position=4: expected 0 for objective=dpo; .*causal_lm, sft'),
        ({'task': 'ppo'}, r'eval\.by_position=4: expected 0 for task=ppo'),
        ({'data.seq_len': 3}, r'eval\.by_position=4: expected at most data\.seq_len=3'),
    ],
    ids=['objective', 'task', 'seq_len'],
)
def test_where_it_says_nothing_it_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        setup.position_bounds(full_config({'eval.by_position': BUCKETS, **changes}))
