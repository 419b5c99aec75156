"""What a value of a recipe may be."""

import pytest

from jaxtune.common.checks import ExpectedError, described, plugin
from jaxtune.models import FAMILIES


def test_plugin():
    check = plugin('none', 'jaxtune.models:FAMILIES')
    for value in ('none', *FAMILIES.names, 'mine.models:FAMILY', '~/mine.py:FAMILY'):
        assert check(value) == value
    for value in ('lama', '', ':FAMILY', 'mine:', 'mine:a b', 5, ('llama',), None):
        with pytest.raises(ExpectedError, match=r'^one of none, llama, .*, or module:NAME of your own') as error:
            check(value)
        assert ('(nearest: llama)' in str(error.value)) == (value == 'lama')
    with pytest.raises(ExpectedError, match='NUL'):
        check('a\0b:FAMILY')


def test_plugin_imports_nothing_until_it_checks():
    check = plugin('no_such_module:NAMES')
    with pytest.raises(ModuleNotFoundError):
        check('x')


def test_described():
    """Names come as a text, several, a mapping or pairs, also as texts of these; the pairs come back."""
    pairs = (('<a>', ''), ('<b c>', ''))
    for value in ('<a>, <b c>', ('<a>', '<b c>'), ['<a>', '<b c>'], "('<a>', '<b c>')", [['<a>', ''], ['<b c>', '']]):
        assert described(value) == pairs == described(pairs)
    for value in ({'<a>': 'the fox'}, "{'<a>': 'the fox'}", [('<a>', 'the fox')]):
        assert described(value) == (('<a>', 'the fox'),)
    assert described('[INST]') == (('[INST]', ''),)
    assert described('') == described(()) == described({}) == ()
    for value in (5, None, '<a>,,<b>', ',', ('a', 'a'), {'a': 3}, ('',), [('a', 'b', 'c')], [3]):
        with pytest.raises(ExpectedError, match='names such as'):
            described(value)
    with pytest.raises(ExpectedError, match='UTF-8'):
        described(['\ud800'])
