"""Arguments of tool calls: JSON texts or mappings, of which templates take either, and seldom both.

A record may hold either form, and is rendered as it is first. A template that cannot use it fails, or writes JSON
within a text of JSON, or Python's own form of a mapping: then the other form is rendered.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from jaxtune.data.formats import Chat


def as_mappings(chat: Chat) -> Chat:
    """The conversation with the arguments of its calls as mappings, where they are JSON objects."""
    return _converted(chat, _mapping)


def as_texts(chat: Chat) -> Chat:
    """The conversation with the arguments of its calls as JSON texts."""
    return _converted(chat, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def misread(chat: Chat, text: str) -> bool:
    """Whether a rendering holds arguments in a form that is no JSON, or JSON within a text of JSON."""
    for value in _arguments(chat):
        if isinstance(value, str):
            quoted = {json.dumps(value, ensure_ascii=False), json.dumps(value)}
            if isinstance(_mapping(value), dict) and any(form in text for form in quoted):
                return True
        elif value and str(value) != json.dumps(value, ensure_ascii=False) and str(value) in text:
            return True
    return False


def _mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _arguments(chat: Chat) -> Iterator[Any]:
    for turn in chat.turns:
        for call in turn.get('tool_calls') or ():
            yield call.get('function', call).get('arguments')


def _converted(chat: Chat, convert: Callable[[Any], Any]) -> Chat:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        if 'function' in call:
            return call | {'function': changed(call['function'])}
        return call | {'arguments': convert(call['arguments'])} if 'arguments' in call else call

    turns = [
        turn | {'tool_calls': [changed(call) for call in turn['tool_calls']]} if turn.get('tool_calls') else turn
        for turn in chat.turns
    ]
    return dataclasses.replace(chat, turns=tuple(turns))
