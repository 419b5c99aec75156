"""What a value of a recipe may be."""

import pytest

from jaxtune.common.checks import ExpectedError, plugin
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
