"""Notes, facts and progress, on a terminal and in a log."""

import io
import time

import pytest

from jaxtune.common import console


@pytest.fixture
def out(monkeypatch):
    """A console that is no terminal; returns what it was given."""
    return _console(monkeypatch, terminal=False)


@pytest.fixture
def terminal(monkeypatch):
    return _console(monkeypatch, terminal=True)


def _console(monkeypatch, terminal):
    file = io.StringIO()
    fresh = console.Console(
        file=file, force_terminal=terminal, width=80, highlight=False, emoji=False, color_system=None, _environ={}
    )
    monkeypatch.setattr(console, '_console', fresh)
    return file


def test_a_note_is_printed_as_it_is(out):
    text = '[bold]data.train=[/]: ' + 'x' * 200 + ' :smile:'
    console.note(text)
    assert out.getvalue() == text + '\n'


def test_only_the_primary_process_speaks(out):
    console.set_primary(False)
    try:
        console.note('not me')
        console.facts([('a', 1)])
        console.table([('a',), (1,)])
        with console.progress(2, 'train', 'step') as bar:
            bar.advance()
        assert bar.done == 1
    finally:
        console.set_primary(True)
    assert out.getvalue() == ''


def test_facts_are_aligned_and_fit_in_80_columns(out):
    console.facts([('model', 'llama ' * 30), ('nothing', ''), ('x', '/' + 'p' * 100)])
    lines = out.getvalue().splitlines()
    assert [line[:7] for line in lines[:2]] == ['model  ', '       ']
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1] == 'x      /' + 'p' * 100, 'a path stays whole'


def test_a_table_is_aligned(out):
    console.table([('name', 'count'), ('a', 12345), ('long one', 7)])
    assert out.getvalue() == 'name       count\na         12,345\nlong one       7\n'


def test_a_log_gets_few_lines(out, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    with console.progress(1000, 'train', 'step', initial=100) as bar:
        for i in range(900):
            now[0] += 1.0
            bar.advance(1, loss=f'{i}')
    lines = out.getvalue().splitlines()
    assert len(lines) == 9, 'one each tenth of the way'
    assert lines[0].split('  ') == ['train 200/1,000 20%', '1.0 step/s', '1:40<13:20', 'loss=99']
    assert lines[-1].startswith('train 1,000/1,000 100%')


def test_a_quick_inner_bar_leaves_no_line_in_a_log(out):
    with console.progress(3, 'train', 'step') as bar:
        with console.progress(5, 'evaluate', 'batch') as inner:
            for _ in range(5):
                inner.advance()
        bar.advance(3)
    assert 'evaluate' not in out.getvalue()
    assert out.getvalue().count('train 3/3 100%') == 1


def test_bars_nest_on_a_terminal_and_notes_stand_above(terminal):
    with console.progress(4, 'train', 'step') as bar:
        bar.advance(2, loss='2.345', tokens='1,234/s')
        with console.progress(7, 'evaluate', 'batch') as inner:
            inner.advance(7)
            console.note('a note [above]')
            during = terminal.getvalue()
        bar.advance(2)
    assert 'evaluate' in during
    assert 'a note [above]\n' in during
    last = terminal.getvalue().rsplit('\r', 1)[-1]
    assert '100%' in last
    assert '4/4' in last
    assert 'loss=2.345 tokens=1,234/s' in last, 'everything fits in 80 columns'
    assert 'evaluate' not in last, 'an inner bar goes'
    assert console._shared is None


def test_an_error_inside_ends_the_display(terminal):
    def fail():
        with console.progress(4, 'train', 'step'), console.progress(4, 'evaluate', 'batch'):
            raise ValueError('inside')

    with pytest.raises(ValueError, match='inside'):
        fail()
    assert console._shared is None
    with console.progress(1, 'again', 'step') as bar:
        bar.advance()
    assert 'again' in terminal.getvalue()


def test_advancing_is_cheap(terminal):
    with console.progress(10**9, 'train', 'step') as bar:
        start = time.perf_counter()
        for _ in range(5000):
            bar.advance(1, loss='2.345')
        seconds = time.perf_counter() - start
    assert seconds / 5000 < 1e-4
