"""`rl.reward`: several with weights, shipped ones in processes of their own, and what is wrong in a line."""

import os

import jax
import numpy as np
import pytest

from jaxtune.errors import StepError, UserError
from jaxtune.generation.prompts import Prompt
from jaxtune.recipe import recipes
from jaxtune.rl import rewards, sandbox, shipped

MINE = """
import time


def short(completions, **rest):
    return [-len(text) for text in completions]


def none(completions, **rest):
    return [1.0 if text == 'a' else None for text in completions]


def picky(completions, **rest):
    return [1 / len(text) for text in completions]


def slow(completions, **rest):
    time.sleep(60)


def few(completions, **rest):
    return [1.0]
"""
PROMPTS = [Prompt('1 + 1?', [1], '2'), Prompt('2 + 2?', [1], '4'), Prompt('3 + 3?', [1], 'so\n#### 6')]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens what `rl.reward` names, beside a file `mine.py`."""
    (tmp_path / 'mine.py').write_text(MINE)
    monkeypatch.chdir(tmp_path)

    def opened(value, **keys):
        config = recipes.defaults()
        recipes.apply_overrides(config, {'rl.reward': value, **{f'rl.{name}': x for name, x in keys.items()}})
        rewards.check(config.rl)
        return rewards.open_reward(config.rl, lambda path: pytest.fail(path), jax.make_mesh((1,), ('data',)), 4)

    return opened


def test_one_name_without_a_weight_is_what_it_was(opened):
    reward = opened('mine.py:short')
    scores, parts = reward.scores(PROMPTS, ['a', 'bb', ''])
    assert (scores.tolist(), scores.dtype, parts, reward.name) == ([-1, -2, 0], np.float32, {}, 'mine.py:short')


def test_several_are_summed_by_weight_and_told_apart(opened):
    reward = opened('math:1.0, format:0.5,mine.py:short:0.1,mine.py:short', format_pattern='.*')
    scores, parts = reward.scores(PROMPTS, ['it is 2', '5', '6'])
    assert {name: values.tolist() for name, values in parts.items()} == {
        'math': [1, 0, 1], 'format': [1, 1, 1], 'short': [-7, -1, -1], 'short_2': [-7, -1, -1],
    }  # fmt: skip
    np.testing.assert_allclose(scores, [1 + 0.5 - 0.7 - 7, 0.5 - 0.1 - 1, 1 + 0.5 - 0.1 - 1], rtol=1e-6)
    assert reward.score(PROMPTS, ['it is 2', '5', '6']).tolist() == scores.tolist()
    assert opened('length:2').scores(PROMPTS[:1], ['a'])[0].tolist() == [2.0]


def test_completions_are_divided_over_processes_in_their_order(opened, monkeypatch):
    monkeypatch.setattr(rewards, '_PROCESSES', 3)
    reward = opened('math')
    texts = [str(number) for number in range(11)]
    prompts = [Prompt('', [1], str(number if number % 3 else -1)) for number in range(11)]
    assert reward.score(prompts, texts).tolist() == [float(bool(number % 3)) for number in range(11)]
    assert len(reward.score._processes) == 3
    assert reward.score(prompts[1:2], texts[1:2]).tolist() == [1.0]


@pytest.mark.skipif(bool(sandbox.unavailable(sandbox.Limits())), reason='the system has no namespaces')
def test_code(opened):
    reward = opened('code:2.0', code_seconds=1.0, code_memory=256)
    prompts = [Prompt('', [1], 'assert f(1) == 2')] * 3
    texts = ['f = lambda x: x + 1', 'f = lambda x: x', 'while True: pass']
    assert reward.scores(prompts, texts)[1]['code'].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(StepError, match=r'rl.reward=code: .*expected tests.* it fails on the answer'):
        reward.score([Prompt('', [1], '[]')], ['x = 1'])


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('none', "rl.reward=mine.py:none: returned None for 'bb'; expected a number for each completion"),
        ('picky', "ZeroDivisionError: division by zero; it fails on the answer ''"),
        (
            'slow',
            "has not returned after 0.3 seconds; expected it within rl.reward_timeout; it was asked about 'a' and 2 m",
        ),
        ('few', "returned 1 numbers for 3 completions, the first of them 'a'; expected one each"),
    ],
)
def test_what_a_function_does_instead_is_said_with_the_sample(opened, name, said):
    reward = opened(f'mine.py:{name}', reward_timeout=30.0)
    reward.score._processes[0].seconds = 0.3 if name == 'slow' else 30.0
    with pytest.raises(StepError) as caught:
        reward.score(PROMPTS, ['a', 'bb', ''])
    assert said in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('value', 'said'),
    [
        ('', "rl.reward='': expected a reward model's workdir"),
        ('math:1,,format:1', 'expected a reward model'),
        ('math:nan', 'the weight nan of math: expected a finite number'),
        ('math:1,@reward:1', '@STAGE stands alone'),
        ('math:1,mine.py:gone:2', "mine.py has no 'gone'"),
        ('math:1,nowhere/model:2', 'nowhere/model'),
    ],
)
def test_what_is_wrong_with_the_names(opened, value, said):
    with pytest.raises(UserError) as caught:
        opened(value)
    assert said in str(caught.value)


def test_a_folder_whose_name_has_a_comma_or_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs('a,b:2')
    assert rewards.split('a,b:2') == [('a,b:2', None)]
    assert rewards.kind_of('a,b:2') == rewards.MODEL


def test_records_without_an_answer_are_refused_where_it_is_needed(opened):
    without = [*PROMPTS, Prompt('why?', [1])]
    rewards.check_references(opened('length'), without, 'data.train')
    with pytest.raises(UserError, match=r"1 of 4 prompts of data.train have none, such as 'why\?'"):
        rewards.check_references(opened('length:1,exact:2'), without, 'data.train')


def test_the_short_ones():
    assert shipped.exact([' 4\n', '4.0'], ['4', '4']) == [1.0, 0.0]
    assert shipped.short(['x' * 10, 'x' * 15, 'x' * 20, 'x' * 99], 10) == [1.0, 0.5, 0.0, 0.0]
    both = '<think>\nwhy\n</think>\n<answer>4</answer>'
    assert shipped.formatted([both, both + both, f'x{both}', '<think></think>x<answer>4</answer>'], 'think,answer') == [
        1.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert shipped.formatted(['#### 4', 'why\n#### 4', '#### four'], r'.*#### \d+') == [1.0, 1.0, 0.0]


@pytest.mark.parametrize('text', ['<think>\nwhy\n</think>\nso', '<think>why so', 'so', '<think>a<think>b</think>c'])
def test_think_is_trls(text):
    trl = pytest.importorskip('trl.rewards')
    assert shipped.formatted([text], 'think') == trl.think_format_reward([[{'content': text}]])
