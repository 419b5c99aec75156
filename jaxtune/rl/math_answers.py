r"""The reward `math`: the answer of a text, read as an exact rational where it is a number, against the record's.

The answer is what the last `\boxed{}` holds, or what follows the last `####` (as GSM8K has it), or the last number.
`\frac{1}{2}`, `1/2`, `0.5` and `50\%` are the same; so are `1,234`, `1{,}234` and `\$1234.00`, `2\frac{1}{2}` and
`5/2`, `12 cm` and `12` (but not `12 m`). What is no number is compared as text without spaces and LaTeX's trimmings;
tuples and intervals part by part, sets and lists in any order. Nothing is evaluated, and every text takes time that
grows as its length does.
"""

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction

_LONGEST = 300  # characters of an answer that are read
_LARGEST_EXPONENT = 100

_UNSIGNED = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,100})(?:\.\d{1,100})?|\.\d{1,100}'
_LAST = re.compile(
    r'(?P<sign>(?<![\w)\]}.])[-+]\s?)?(?:\\?\$\s?)?(?P<number>'
    rf'(?:\d{{1,9}}\s?)?\\frac\s?\{{[-+]?\d{{1,100}}\}}\s?\{{\d{{1,100}}\}}|(?:{_UNSIGNED})(?:\s?/\s?(?:{_UNSIGNED}))?)'
    r'(?P<percent>\s?\\?%)?'
)
_SAYS = re.compile(r'(?:answer|result)\s*(?:is|:|=)[ \t]*(.{1,300})', re.IGNORECASE)
_UNIT = re.compile(
    r'^(.*?[\d})%])(\s+[^\W\d_]{1,20}|[^\W\d_]{2,20})((?:[\s/*^.-]*[^\W_]{1,20}){0,4})[.\s]*$', re.DOTALL
)
_BRACKETS = {'(': ')', '[': ']', '{': '}'}
_REPLACED = (
    *((text, '-') for text in ('−', '–', '﹣', '－')),
    *((text, ' ') for text in ('\xa0', '\u2009', '\u202f', '~', '\\quad', '\\,', '\\;', '\\:', '\\ ', '\\!', '\n')),
    ('{,}', ','), ('，', ','), ('\\dfrac', '\\frac'), ('\\tfrac', '\\frac'), ('\\cfrac', '\\frac'), ('⁄', '/'),
    ('\\left', ''), ('\\right', ''), ('\\$', ''), ('$', ''), ('€', ''), ('£', ''), ('¥', ''), ('\\(', ''), ('\\)', ''),
    ('\\[', ''), ('\\]', ''), ('％', '%'), ('\\%', '%'), ('^{\\circ}', ''), ('^\\circ', ''), ('\\degree', ''),
    ('°', ''),
    ('\\times', '*'), ('\\cdot', '*'), ('×', '*'), ('·', '*'), ('\\div', '/'), ('÷', '/'), ('\\{', '{'), ('\\}', '}'),
    ('**', ''),
)  # fmt: skip


def score(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each completion whose answer is the reference's, else 0."""
    return [float(right(text, reference)) for text, reference in zip(completions, references, strict=True)]


def right(completion: str, reference: str) -> bool:
    """Whether the answer of a completion is that of the record."""
    expected = _expected(reference)
    return any(same(answer, expected) for answer in _answers(completion))


def _answers(text: str) -> list[str]:
    """What a completion may mean as its answer: one thing, where it marks it."""
    text = text.rpartition('</think>')[2]
    if (marked := _marked(text)) is not None:
        return [marked]
    number = _last_number(text)
    said = [found[-1].strip().rstrip('.') for found in [_SAYS.findall(text)] if found]
    return said + ([number] if number else []) if not said or _value(_plain(said[0])) is None else said


def _expected(reference: str) -> str:
    if (marked := _marked(reference)) is not None:
        return marked
    short = reference.strip()
    return short if len(short) <= _LONGEST and '\n' not in short else _last_number(reference) or short


def _marked(text: str) -> str | None:
    r"""What the last `\boxed{}` holds, or the line after the last `####`; None where there is neither."""
    at = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
    if at >= 0:
        rest = text[text.find('d', at) + 1 if text.startswith('\\boxed', at) else at + 5 :].lstrip()
        return _braced(rest)[0] if rest.startswith('{') else rest.split('$')[0].split()[0] if rest.split() else ''
    if '####' in text:
        return (text.rpartition('####')[2].strip().splitlines() or [''])[0]
    return None


def _braced(text: str) -> tuple[str, str]:
    """What the first pair of braces of a text that begins with one holds, and the rest; nothing if it is not closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == '{') - (letter == '}')
        if not depth:
            return text[1:place], text[place + 1 :]
    return '', ''


def _last_number(text: str) -> str:
    text = text[-20_000:].replace('−', '-').replace('\\dfrac', '\\frac').replace('{,}', ',')
    numbers = list(_LAST.finditer(text))
    if not numbers:
        return ''
    found = numbers[-1]
    return f'{(found["sign"] or "").strip()}{found["number"]}{"%" if found["percent"] else ""}'


def _plain(text: str) -> str:
    """A text without what LaTeX and Markdown put around it."""
    text = text.strip()[: _LONGEST + 1]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    text = re.sub(r'\\(?:text|mathrm|mbox|textbf|mathbf|textit|operatorname)\s?\{([^{}]*)\}', r' \1', text)
    text = re.sub(r'^\s*[A-Za-z](?:_\w)?\s?=(?!=)', '', text)  # x = 5
    return text.strip().rstrip('.').strip()


@dataclasses.dataclass(frozen=True)
class _Value:
    number: Fraction
    percent: bool
    unit: str


def _value(text: str) -> _Value | None:
    """A plain text as a number, maybe with a unit; None if it is none."""
    unit = ''
    number = _rational(text.removesuffix('%').strip())
    if number is None and (split := _UNIT.match(text)):
        text, unit = split[1].strip(), f'{split[2]}{split[3]}'.strip().lower().rstrip('.')
        number = _rational(text.removesuffix('%').strip())
    return None if number is None else _Value(number, text.endswith('%'), unit.removesuffix('s'))


def _rational(text: str, depth: int = 0) -> Fraction | None:
    """A number, a fraction, a mixed number, a power or a product of these; None if it is something else."""
    text = text.strip()
    if not text or depth > 4 or len(text) > _LONGEST:
        return None
    if text[0] in '+-':
        inner = _rational(text[1:], depth + 1)
        return None if inner is None or text[1:].lstrip()[:1] in ('+', '-') else inner if text[0] == '+' else -inner
    if re.fullmatch(_UNSIGNED, text) or re.fullmatch(r'\d{1,3}(?: \d{3})+', text):
        return Fraction(text.replace(',', '').replace(' ', ''))
    if (text[0] == '(' and text[-1] == ')') or (text[0] == '{' and _braced(text)[1] == '' and text[-1] == '}'):
        return _rational(text[1:-1], depth + 1)
    if mixed := re.fullmatch(r'(\d{1,50})\s?(\\frac.+)|(\d{1,50}) (\d{1,50}\s?/\s?\d{1,50})', text):
        whole, part = Fraction(mixed[1] or mixed[3]), _rational(mixed[2] or mixed[4], depth + 1)
        return None if part is None else whole + part
    if text.startswith('\\frac'):
        return _latex_fraction(text[len('\\frac') :].lstrip(), depth)
    for sign, combine in (('*', lambda a, b: a * b), ('/', lambda a, b: a / b if b else None)):
        if sign in text:
            left, _, right = text.rpartition(sign)
            parts = _rational(left, depth + 1), _rational(right, depth + 1)
            return None if None in parts else combine(*parts)
    if power := re.fullmatch(r'(.+)\^\{?\s?([-+]?\d{1,3})\s?\}?', text):
        base, exponent = _rational(power[1], depth + 1), int(power[2])
        fits = base is not None and abs(exponent) <= _LARGEST_EXPONENT and (base or exponent >= 0)
        return base**exponent if fits and base is not None else None
    if scientific := re.fullmatch(rf'({_UNSIGNED})[eE]([-+]?\d{{1,3}})', text):
        return Fraction(scientific[1].replace(',', '')) * Fraction(10) ** int(scientific[2])
    return None


def _latex_fraction(text: str, depth: int) -> Fraction | None:
    r"""What follows `\frac`: two numbers in braces, or of one digit each."""
    parts = []
    for _ in range(2):
        text = text.lstrip()
        part, text = _braced(text) if text.startswith('{') else (text[:1], text[1:])
        parts.append(_rational(part, depth + 1))
    over, under = parts
    return over / under if over is not None and under and not text.strip() else None


def same(answer: str, expected: str) -> bool:
    """Whether two answers are the same."""
    one, two = _plain(answer), _plain(expected)
    if not one or not two or max(len(one), len(two)) > _LONGEST:
        return False
    a, b = _value(one), _value(two)
    if a is not None and b is not None:
        units = not a.unit or not b.unit or a.unit == b.unit
        factor = {1: Fraction(1, 100), 0: Fraction(1), -1: Fraction(100)}[a.percent - b.percent]
        return units and (a.number == b.number or a.number * factor == b.number)
    ours, theirs = _parts(one), _parts(two)
    if ours is not None and theirs is not None:
        return _same_parts(ours, theirs)
    return a is None and b is None and _squashed(one) == _squashed(two)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the parts of a tuple, an interval, a set or a list; None if it is none."""
    opening = text[0] if text[0] in _BRACKETS and len(text) > 1 and text[-1] in ')]}' else ''
    brackets, inner = (text[0] + text[-1], text[1:-1]) if opening else ('', text)
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(inner):
        depth += (letter in '([{') - (letter in ')]}')
        if letter in ',;' and not depth:
            parts.append(inner[begin:place])
            begin = place + 1
    parts.append(inner[begin:])
    return (brackets, [part.strip() for part in parts]) if len(parts) > 1 or brackets == '{}' else None


def _same_parts(one: tuple[str, list[str]], two: tuple[str, list[str]]) -> bool:
    (brackets, ours), (others, theirs) = one, two
    if brackets != others or len(ours) != len(theirs):
        return False
    if brackets not in ('', '{}'):
        return all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    left = list(theirs)  # in any order
    for part in ours:
        place = next((place for place, other in enumerate(left) if same(part, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _squashed(text: str) -> str:
    text = re.sub(r'[\s{}]', '', text).casefold()
    choice = re.fullmatch(r'\(([a-z])\)', text)
    return choice[1] if choice else text
