"""What a template makes of a conversation beside its texts: tools, their calls and reasoning are not left out unsaid.

A template that does not know them renders the rest without a word, and the model would learn another answer, or none.
Whether one knows a field is seen by rendering the conversation with another value there: the text must change.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxtune.data.formats import REASONING, Chat, FormatError
from jaxtune.data.templates import Template

_OTHER = 'x'  # what another text has at its end


class Rendered(NamedTuple):
    """A conversation with its text.

    Attributes:
      chat: the conversation.
      prompt: with the generation prompt.
      text: what was made of it.
      first: turns are looked at from this one on.
      reasoning: that of the last turn must be in the text.
    """

    chat: Chat
    prompt: bool
    text: str
    first: int = 0
    reasoning: bool = True


def check(template: Template, rendered: Iterable[Rendered]) -> None:
    """Refuses a template that leaves out what conversations hold beside the text of their turns.

    Raises:
      FormatError: it leaves out the tools, a call of one or its arguments, or the reasoning of the last answer.
    """
    for one in rendered:
        changes = list(_changes(template, one))
        # A template that refuses the other value has looked at it.
        renderings = template.try_all([(chat, one.prompt) for _, chat in changes]) if changes else []
        for (what, _), rendering in zip(changes, renderings, strict=True):
            if not isinstance(rendering, Exception) and rendering[0] == one.text:
                raise FormatError(
                    'unwritten',
                    f'{template.name} template does not write {what}; expected data.template to be one that does, or '
                    'records without',
                )


def _changes(template: Template, rendering: Rendered) -> Iterator[tuple[str, Chat]]:
    """What a conversation holds beside texts, each with the conversation as it would be with another value there."""
    chat, last = rendering.chat, len(rendering.chat.turns) - 1
    if chat.tools and not rendering.first and template.reads_tools(chat.tools):
        yield "the record's tools", dataclasses.replace(chat, tools=_other(chat.tools))
    if chat.documents and not rendering.first:
        yield "the record's documents", dataclasses.replace(chat, documents=_other(chat.documents))
    for number, turn in enumerate(chat.turns[rendering.first :], rendering.first):
        if turn['role'] != 'assistant':
            continue
        changes = _of_calls(turn)
        # Of earlier turns many a template leaves it out on purpose.
        if rendering.reasoning and number == last and turn.get(REASONING):
            reasoning = dict.fromkeys((REASONING, 'thinking'), _other(turn[REASONING]))
            changes = itertools.chain(changes, [('the reasoning', turn | reasoning)])
        for what, changed in changes:
            turns = (*chat.turns[:number], changed, *chat.turns[number + 1 :])
            yield f'{what} of turn {number + 1}', dataclasses.replace(chat, turns=turns)


def _of_calls(turn: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    calls = turn.get('tool_calls') or []
    if calls and turn['content'].strip():
        yield 'the text beside tool calls', turn | {'content': f'{turn["content"]}{_OTHER}'}
    for number, call in enumerate(calls):
        function = call.get('function', call)
        for part in ('name', 'arguments'):
            if not function.get(part):
                continue
            changed = function | {part: _other(function[part])}
            changed = call | {'function': changed} if 'function' in call else changed
            what = f"the {part} of tool call {number + 1} ('tool_calls')"
            yield what, turn | {'tool_calls': [*calls[:number], changed, *calls[number + 1 :]]}


def _other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, dict):
        return {name: _other(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_other(inner) for inner in value]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    if not isinstance(value, str):
        return str(value)
    try:
        inner = json.loads(value) if value.lstrip().startswith(('{', '[')) else None
    except ValueError:
        inner = None
    return json.dumps(_other(inner)) if inner else f'{value}{_OTHER}'
