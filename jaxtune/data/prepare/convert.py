"""Instruction and preference data: what a record must hold, and pairs made of the documentation of python-stdlib."""

import ast
import hashlib
import re
from collections.abc import Iterator
from typing import Any

from jaxtune.data import stdlib
from jaxtune.data.prepare.decontaminate import texts

# An answer that says too little teaches nothing; one that goes on for pages is a manual.
_SHORTEST, _LONGEST = 60, 2000

# Fields that a record of each format has, with what they hold.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    'pair': {'source': str, 'target': str},
    'alpaca': {'instruction': str, 'output': str},
    'sharegpt': {'conversations': list},
    'messages': {'messages': list},
    'prompt': {'prompt': (str, list)},
    'preference': {'chosen': (str, list, dict), 'rejected': (str, list, dict)},
}


def checked(record: Any, form: str) -> tuple[str, str]:
    """All text of a record, and its kind.

    Raises:
      ValueError: it is no record of the format.
    """
    if not isinstance(record, dict):
        raise ValueError(f'expected an object; found {type(record).__name__}')
    for name, kind in _FIELDS[form].items():
        value = record.get(name)
        if not isinstance(value, kind) or not value:
            raise ValueError(f'expected {name!r} of data.format={form}; found {", ".join(map(repr, list(record)[:8]))}')
    text = '\n'.join(texts(record))
    text.encode()  # half a surrogate pair is a ValueError too
    if form == 'preference' and record['chosen'] == record['rejected']:
        raise ValueError('chosen and rejected are the same')
    return text, 'records'


_WHAT = (
    'What does `{name}` do in Python?',
    'Explain `{name}{signature}` from the Python standard library.',
    'I came across `{name}` in some Python code. What is it for?',
    'Describe what the {kind} `{name}` of Python does.',
)
_WHICH = (
    'Which {kind} in Python does this: {summary}',
    'Name the {kind} of the Python standard library that fits this description: {summary}',
)


def from_stdlib(form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions and answers from the docstrings of the running interpreter's library: `(name, record of a format)`.

    A rejected answer is the documentation of something else in the same module, or a sentence of the right one where
    the module has no other: wrong or too little, in the same style and of about the same length.
    """
    documented = list(_documented())
    by_module: dict[str, list[int]] = {}
    for number, (module, _, _, _, _) in enumerate(documented):
        by_module.setdefault(module, []).append(number)
    for number, (module, name, kind, signature, doc) in enumerate(documented):
        choice = hashlib.blake2b(name.encode(), digest_size=8).digest()
        question = _WHAT[choice[0] % len(_WHAT)].format(name=name, kind=kind, signature=signature)
        yield name, _record(form, question, doc, _other(documented, by_module[module], number, choice[1]))
        summary = re.split(r'(?<=[.!?])\s|\n\n', doc)[0].replace('\n', ' ').strip()
        tail = name.rsplit('.', 1)[-1]
        if 30 <= len(summary) <= 300 and tail.lower() not in summary.lower():
            question = _WHICH[choice[2] % len(_WHICH)].format(kind=kind, summary=summary)
            answer = f'That is `{name}{signature}`.\n\n{doc}'
            wrong = _other(documented, by_module[module], number, choice[3], named=True)
            yield name, _record(form, question, answer, wrong)


def _other(documented: list, numbers: list[int], number: int, choice: int, named: bool = False) -> str:
    rivals = [i for i in numbers if i != number and documented[i][4] != documented[number][4]]
    if not rivals:
        doc = documented[number][4]
        return (
            f'It is part of the module `{documented[number][0]}`.'
            if named
            else doc[: max(20, len(doc) // 4)].rsplit(' ', 1)[0]
        )
    length = len(documented[number][4])
    near = sorted(rivals, key=lambda i: (abs(len(documented[i][4]) - length), i))[:4]
    _, name, _, signature, doc = documented[near[choice % len(near)]]
    return f'That is `{name}{signature}`.\n\n{doc}' if named else doc


def _record(form: str, question: str, answer: str, wrong: str) -> dict[str, Any]:
    if form == 'alpaca':
        return {'instruction': question, 'input': '', 'output': answer}
    if form == 'pair':
        return {'source': question, 'target': answer}
    if form == 'sharegpt':
        return {'conversations': [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]}
    if form == 'messages':
        return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}
    if form == 'prompt':
        return {'prompt': question}
    return {'prompt': question, 'chosen': answer, 'rejected': wrong}


def _documented() -> Iterator[tuple[str, str, str, str, str]]:
    """`(module, name, kind, signature, docstring)` of public functions, classes and methods, in the order of paths."""
    seen = set()
    for module, source in stdlib.modules():
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for name, kind, node in _public(tree.body, module):
            doc = ast.get_docstring(node)
            if doc is None or not _SHORTEST <= len(doc) <= _LONGEST or doc in seen:
                continue
            seen.add(doc)
            yield module, name, kind, _signature(node), doc


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(body: list[ast.stmt], prefix: str, kind: str = 'function') -> Iterator[tuple[str, str, _Definition]]:
    for node in body:
        if isinstance(node, _Definition) and not node.name.startswith('_'):
            name = f'{prefix}.{node.name}'
            if isinstance(node, ast.ClassDef):
                yield name, 'class', node
                yield from _public(node.body, name, 'method')
            else:
                yield name, kind, node


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return ''
    arguments = ast.unparse(node.args)
    arguments = re.sub(r'^(?:self|cls)(?:, )?', '', arguments)
    return f'({arguments})' if len(arguments) < 120 else '(…)'
