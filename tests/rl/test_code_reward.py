"""The reward `code`: which program of an answer is run, by which tests of a record, and what that is worth."""

import json

import pytest

from jaxtune.rl import code_reward, sandbox

ADD = 'def add(a, b):\n    return a + b'
needs_sandbox = pytest.mark.skipif(bool(sandbox.unavailable(sandbox.Limits())), reason='the system has no namespaces')


@pytest.mark.parametrize(
    ('text', 'program'),
    [
        (ADD, ADD),
        (f'Here:\n```python\n{ADD}\n```\nDone.', ADD),
        (f'```python\nold\n```\nBetter:\n```py\n{ADD}\n```\n```\n5\n```', ADD),
        (f'```\n{ADD}\n```', ADD),
        (f'```python\n{ADD}', ADD),  # cut off
        (f'<think>```python\nold\n```</think>\n{ADD}', f'\n{ADD}'),
    ],
)
def test_the_program_of_an_answer(text, program):
    assert code_reward.program(text) == program


def test_the_tests_of_a_record():
    assert code_reward.tests('assert add(1, 2) == 3') == [{'code': 'assert add(1, 2) == 3'}]
    assert code_reward.tests('["assert 1", "assert 2"]') == [{'code': 'assert 1'}, {'code': 'assert 2'}]
    assert code_reward.tests('{"inputs": ["1"], "outputs": ["2"]}') == [{'input': '1', 'output': '2'}]
    for wrong in ('', '[]', '[1]', '{"inputs": ["1"]}', '{"inputs": ["1", "2"], "outputs": ["2"]}', '{"a": 1}'):
        with pytest.raises(ValueError, match='expected tests'):
            code_reward.tests(wrong)


@needs_sandbox
def test_what_answers_are_worth():
    asserted, printed = 'assert add(1, 2) == 3', json.dumps({'inputs': ['1 2', '3 4'], 'outputs': ['3', '7']})
    answers = [
        (f'```python\n{ADD}\n```', asserted),
        ('def add(a, b): return 3', json.dumps([asserted, 'assert add(2, 2) == 4'])),
        ('print(sum(map(int, input().split())))', printed),
        ('print(3)', printed),
        ('I do not know.', asserted),
        ('while True: pass', asserted),
        ('import os\nos._exit(0)', asserted),
    ]
    completions, references = zip(*answers, strict=True)
    assert code_reward.score(completions, references, 2.0, 256, False) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
