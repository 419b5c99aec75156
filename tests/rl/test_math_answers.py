"""Answers of mathematics as models and records write them."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxtune.rl.math_answers import right, same, score

RIGHT = [
    (r'\boxed{\frac{1}{2}}', '0.5'), (r'so \boxed{50\%}', '1/2'), ('It is 1,234.', '1234'),
    ('costs $1,234.00', '1234'), (r'\boxed{2\frac{1}{2}}', '5/2'), (r'\boxed{2 1/2}', '2.5'),
    (r'\boxed{12\text{ cm}}', '12'), ('12 cm', '12 cm'), ('x = -5', '-5'), ('$x=-5$', '-5'),
    ('a lot\n#### 42', 'She has 3.\n#### 42'), (r'\boxed{\dfrac12}', r'\frac{1}{2}'),
    (r'\boxed{-\frac{3}{4}}', '-0.75'), (r'\boxed{3\times10^{4}}', '30000'), (r'\boxed{3e4}', '30000'),
    (r'\boxed{(1, 2)}', '(1,2)'), (r'\boxed{\{2,1\}}', '{1,2}'), ('\\boxed{1, 2}', '2,1'),
    (r'\boxed{x^{2}+1}', 'x^2 + 1'), (r'\boxed{90^\circ}', '90'), (r'\boxed{\text{(A)}}', 'A'),
    ('The answer is blue.', 'blue'), ('answer: 3/4', '0.75'), ('The answer is **18** dollars.', '18'),
    ('#### $18', '#### 18'), (r'\boxed{1{,}234}', '1234'), ('25 percent', '25'), (r'\boxed{1 000 000}', '1000000'),
    (r'\boxed{.5}', '0.5'), ('so 5-3', '3'), ('= -3', '-3'), (r'\boxed{\$18}', '18 dollars'),
    (r'We get \frac{3}{4}.', '0.75'), (r'<think>\boxed{3}</think> 4', '4'), (r'\boxed{7 apples}', '7'),
    (r'\boxed{−3}', '-3'), (r'\boxed{+3}', '3'), ('3.50', '3.5'), (r'\boxed{2^{10}}', '1024'),
    (r'\boxed{[0,1)}', '[0, 1)'), (r'\boxed 5', '5'), (r'\boxed{(-\infty, 2]}', r'(-\infty,2]'),
    (r'\boxed{4}, no, \boxed{5}', '5'), (r'\boxed{\frac{10}{4}}', r'so \boxed{5/2}'),
]  # fmt: skip
WRONG = [
    (r'\boxed{2x}', '2'), (r'\boxed{12 m}', '12 cm'), (r'\boxed{(1,2)}', '(2,1)'), (r'\boxed{[0,1]}', '[0,1)'),
    (r'\boxed{3}', '-3'), ('', '3'), (r'\boxed{', '3'), (r'\boxed{}', '3'), ('0.333', '1/3'), (r'\boxed{1/0}', '1'),
    (r'\boxed{10^{10^{10}}}', '1'), (r'\boxed{9^{999}}', '1'), ('1234', '123'), (r'\boxed{4} no \boxed{5}', '4'),
    ('<think>4', '5'), (r'\boxed{1,2,3}', '1,2'), (r'\boxed{0}', ''), ('no number', '3'),
]  # fmt: skip


@pytest.mark.parametrize(('completion', 'reference'), RIGHT)
def test_the_same_answer_however_it_is_written(completion, reference):
    assert right(completion, reference)


@pytest.mark.parametrize(('completion', 'reference'), WRONG)
def test_another_answer(completion, reference):
    assert not right(completion, reference)


def written(value: Fraction) -> list[str]:
    """A rational in every way that fits it."""
    sign, over, under = '-' if value < 0 else '', abs(value.numerator), value.denominator
    ways = [f'{sign}{over}/{under}', rf'{sign}\frac{{{over}}}{{{under}}}', rf'\dfrac{{{sign}{over}}}{{{under}}}']
    if under == 1:
        ways += [f'{sign}{over}', f'{sign}{over:,}', f'{sign}{over}.00', f'{sign}{over:,}'.replace(',', '{,}')]
    elif over > under:
        ways += [
            rf'{sign}{over // under}\frac{{{over % under}}}{{{under}}}',
            f'{sign}{over // under} {over % under}/{under}',
        ]
    hundredths = value * 100
    if hundredths.denominator == 1:
        ways += [rf'{hundredths}\%', f'{sign}{float(abs(value)):.2f}' if under != 1 else f'{hundredths}%']
    return ways


@settings(max_examples=200, deadline=None)
@given(
    value=st.fractions(-10_000, 10_000, max_denominator=100), other=st.fractions(-10_000, 10_000, max_denominator=100)
)
def test_rationals_are_compared_exactly(value, other):
    for text in written(value):
        assert right(rf'Thus \boxed{{{text}}}.', written(value)[0]), text
        assert right(f'#### {text}', str(value)), text
    if other not in (value, value * 100, value / 100):
        assert not any(same(a, b) for a in written(value) for b in written(other))


@settings(max_examples=300, deadline=2000)
@given(st.text(st.sampled_from('0123456789.,/-+*^(){}[]\\%$ eax\n#'), max_size=300), st.text(max_size=40))
@example('\\boxed{' + '1' * 10_000 + '}', '9' * 10_000)
@example('\\boxed{' + '{' * 150 + '1,1' + '}' * 150 + '}', '{' * 99)
@example('1/' * 5_000 + '1', '2^' * 100)
@example('\\frac{' * 3_000, 'answer is ' * 1_000)
def test_nothing_that_is_written_fails_or_takes_long(completion, reference):
    assert score([completion, reference], [reference, completion])[0] in (0.0, 1.0)
