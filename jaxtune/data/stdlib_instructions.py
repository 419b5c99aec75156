"""Instructions and preferences made of `python-stdlib`, so that every machine has some at hand.

An instruction shows a function of the library, its answer is the first sentence of the function's documentation. A
preference sets that sentence, after the function's first line, against itself with its words in another order. Modules
are either all for training or all held out.
"""

import ast
import random
import re
import zlib
from collections.abc import Iterator

from jaxtune.data import stdlib
from jaxtune.data.records import Placed, Records
from jaxtune.errors import UserError

_HELD_OUT = 12  # one module of so many
_MOST_CODE = 400  # characters of a function that is shown
_QUESTION = 'What does this function do?'


def open_instructions(key: str, pairs: bool) -> Records:
    """Alpaca records, or pairs, of the modules for `data.train` or those for `data.eval`.

    Raises:
      UserError: when read: this interpreter came without the sources of its library.
    """
    held_out = key == 'data.eval'
    name = f'{key}=python-stdlib'

    def read() -> Iterator[Placed]:
        count = 0
        for place, code, sentence in _functions(held_out):
            count += 1
            if pairs:
                mixed = shuffled(sentence)
                if mixed != sentence:
                    prompt = f'{_QUESTION}\n\n{code.splitlines()[0]}'
                    yield place, {'prompt': prompt, 'chosen': sentence, 'rejected': mixed}
            else:
                yield place, {'instruction': _QUESTION, 'input': code, 'output': sentence}
        if not count:
            raise UserError(f'{name}: no documented functions; expected an interpreter that came with its library')

    return Records(name, [stdlib.identity(), held_out, pairs], read)


def shuffled(sentence: str) -> str:
    """The words in another order, the same one every time; a sentence of equal words stays."""
    words = sentence.rstrip('.').split(' ')
    if len(set(words)) < 2:
        return sentence
    mixed, rng = words[:], random.Random(sentence)
    while mixed == words:
        rng.shuffle(mixed)
    return ' '.join(mixed) + ('.' if sentence.endswith('.') else '')


def _functions(held_out: bool) -> Iterator[tuple[str, str, str]]:
    """`(place, code without its documentation, first sentence of it)`."""
    for file in stdlib.sources():
        if (zlib.crc32(stdlib.name_of(file).encode()) % _HELD_OUT == 0) != held_out:
            continue
        try:
            text = file.read_text(encoding='utf-8')
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few modules are in another encoding or dialect on purpose
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (instruction := _instruction(node, lines)):
                yield f'{file}:{node.lineno}', *instruction


def _instruction(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    documentation = ast.get_docstring(node)
    if not documentation or len(node.body) < 2:
        return None
    sentence = re.split(r'(?<=\.)\s|\n\n', documentation, maxsplit=1)[0]
    sentence = ' '.join(sentence.split())
    if not 4 <= len(sentence.split(' ')) <= 24 or '>>>' in sentence:
        return None
    head, body = lines[node.lineno - 1 : node.body[0].lineno - 1], lines[node.body[1].lineno - 1 : node.end_lineno]
    code = [line[node.col_offset :] for line in (*head, *body)]
    return '\n'.join(code)[:_MOST_CODE].rstrip(), sentence
