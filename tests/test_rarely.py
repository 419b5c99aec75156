"""What `rarely` names is there: a test that was renamed must not slip back unseen, nor a name stay without a test."""

import pathlib
import re

import pytest
import rarely


@pytest.mark.parametrize('name', [*rarely.EVERY, *sorted(rarely.NEVER)])
def test_it_names_a_test(name):
    path, _, function = name.partition('::')
    assert re.search(rf'^def {function}\(', (pathlib.Path(__file__).parent / path).read_text(), re.MULTILINE)
