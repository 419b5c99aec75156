"""A person's reward function, whatever it does: a process of its own keeps it from doing it to the run."""

import re
import time

import pytest

from jaxtune.common import preemption
from jaxtune.errors import UserError
from jaxtune.rl import reward_process
from jaxtune.rl.reward_process import RewardProcess

GIVEN = {'prompts': ['a', 'b'], 'completions': ['ee', 'e'], 'references': [None, 'x']}

FUNCTIONS = """
import os, re, sys, time

calls = 0


def counts(completions, **rest):
    global calls
    calls += 1
    print('called', flush=True)
    return [calls + len(text) for text in completions]


def leaves(completions, **rest):
    sys.exit(0)


def dies(completions, **rest):
    os._exit(0)


def killed(completions, **rest):
    os.kill(os.getpid(), 9)


def asks(completions, **rest):
    return [float(input()) for _ in completions]


def backtracks(completions, **rest):
    return [len(re.match(r'(a+)+$', 'a' * 60 + 'b') or '') for _ in completions]


def endless(completions, **rest):
    while True:
        yield 1


def nothing(completions, **rest):
    pass


def speechless(prompts, completions):
    class Bad(Exception):
        def __str__(self):
            raise ValueError

    raise Bad


def raises(completions, **rest):
    raise KeyboardInterrupt
"""


@pytest.fixture
def opened(tmp_path):
    """Opens a function of `FUNCTIONS`, or of another text."""

    def opened(name, text=FUNCTIONS, seconds=60.0):
        (tmp_path / 'mine.py').write_text(text)
        return RewardProcess(f'{tmp_path}/mine.py:{name}', seconds)

    return opened


def test_it_keeps_what_it_remembers_and_prints_where_the_run_prints(opened, capfd):
    function = opened('counts')
    assert [function(GIVEN), function(GIVEN)] == [[3.0, 2.0], [4.0, 3.0]]
    assert capfd.readouterr().out == 'called\n' * 2


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('leaves', r'mine.py:leaves: \S*mine.py:\d+: SystemExit: 0'),
        ('dies', 'its process ended with status 0'),
        ('killed', 'its process ended by SIGKILL'),
        ('asks', r'mine.py:\d+: EOFError'),
        ('nothing', 'TypeError'),
        ('raises', r'mine.py:\d+: KeyboardInterrupt'),
        ('speechless', r'mine.py:\d+: Bad'),
    ],
)
def test_what_it_does_instead_of_returning_numbers_is_said(opened, name, said):
    function = opened(name)
    with pytest.raises(UserError, match=said):
        function(GIVEN)


def test_without_an_end_it_gives_one_number_too_many(opened):
    assert opened('endless')(GIVEN) == [1.0] * 3


def test_it_has_a_time_limit_even_inside_a_regular_expression(opened):
    function = opened('backtracks')
    function.seconds = 0.3
    with pytest.raises(UserError, match=re.escape('has not returned after 0.3 seconds; expected it within rl.reward')):
        function(GIVEN)
    assert function._child.poll() is not None


def test_it_holds_up_no_signal(opened, monkeypatch):
    function = opened('backtracks')
    monkeypatch.setattr(preemption, '_received', preemption.signal.SIGTERM)
    monkeypatch.setattr(preemption, '_since', time.monotonic() - 60)
    with pytest.raises(preemption.Interrupted):
        function(GIVEN)


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('import sys; sys.exit(0)', 'the module fails: SystemExit'),
        ('def f(:', r'mine.py:1: .*SyntaxError'),
        ('f = 3', 'expected a function, found int'),
        ('while True: pass', 'has not returned after 2 seconds'),
    ],
)
def test_a_module_that_cannot_be_imported_is_said(opened, text, said):
    with pytest.raises(UserError, match=said):
        opened('f', text, 2.0 if 'while' in text else 60.0)


def test_its_arguments_are_found_by_name_or_in_order():
    assert reward_process.call(lambda p, c: [p, c], GIVEN) == [['a', 'b'], ['ee', 'e']]
