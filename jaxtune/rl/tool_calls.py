"""Calls of tools in what a model writes, in the forms that chat templates of published models show them."""

import json
import re
from typing import Any, NamedTuple

_TAGGED = re.compile(r'<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)', re.DOTALL)  # Hermes, Qwen 2.5 and 3
_LISTED = re.compile(r'\[TOOL_CALLS\]\s*(.*)', re.DOTALL)  # Mistral
_BARE = re.compile(r'\A\s*(?:<\|python_tag\|>)?\s*(\{.*\})\s*\Z', re.DOTALL)  # Llama 3


class Call(NamedTuple):
    """A call.

    Attributes:
      name: of the tool.
      arguments: by name.
    """

    name: str
    arguments: dict[str, Any]


def find(text: str) -> list[Call]:
    """The calls in a turn, in their order; what is none, or no JSON, is left out."""
    calls = []
    for written in [*_TAGGED.findall(text), *_LISTED.findall(text), *_BARE.findall(text)]:
        values = _parsed(written)
        calls += [call for value in (values if isinstance(values, list) else [values]) if (call := _call(value))]
    return calls


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    function = value.get('function')
    value = function if isinstance(function, dict) else value
    name, arguments = value.get('name'), value.get('arguments', value.get('parameters', {}))
    arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
    return Call(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def tool(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    """The JSON schema of a tool with one argument, a text."""
    parameters = {
        'type': 'object',
        'properties': {argument: {'type': 'string', 'description': meaning}},
        'required': [argument],
    }
    return {'type': 'function', 'function': {'name': name, 'description': description, 'parameters': parameters}}


def asked(text: str, tag: str, name: str, argument: str) -> tuple[str, bool] | None:
    """What a turn asks a tool with one argument.

    Args:
      text: the turn.
      tag: the turn may end with `<tag>…</tag>`.
      name: of the tool, which it may call instead.
      argument: that the call has.

    Returns:
      `(question, tagged)`; None where it asks nothing.
    """
    if text.rstrip().endswith(f'</{tag}>'):
        question = text.rstrip().removesuffix(f'</{tag}>').rpartition(f'<{tag}>')[2]
        return question, True
    for call in reversed(find(text)):
        if call.name == name:
            return str(call.arguments.get(argument, '')), False
    return None
