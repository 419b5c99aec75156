"""What metrics are called, and which of them are better when higher."""

import pytest

from jaxtune.metrics.names import higher_is_better, title, unit


def test_titles():
    assert title('eval/bits_per_byte') == 'Bits per byte'
    assert title('ppo/kl') == 'KL from the reference'
    assert title('mine/kl', {'kl': 'Mine', 'other': ''}) == 'Mine'
    assert title('mine/other', {'other': ''}) == 'Other'


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('memory/peak_bytes', 'bytes'), ('train/mfu', 'percent'), ('ppo/eos_rate', 'percent'), ('eval/loss', '')],
)
def test_units(name, expected):
    assert unit(name) == expected


def test_higher_is_better():
    assert higher_is_better('eval/accuracy')
    assert higher_is_better('eval/reward')
    assert not higher_is_better('eval/loss')
    assert higher_is_better('eval/wins', {'wins'})
