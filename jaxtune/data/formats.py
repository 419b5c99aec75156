r"""Formats of instruction and preference data: records to conversations, every mistake with its place and a count.

| format | a record |
|---|---|
| `alpaca` | `instruction`, maybe `input`, `output`, `system`, `history` (pairs of earlier instructions and outputs) |
| `sharegpt` | `conversations`: turns `{"from", "value"}`; maybe `system`, `tools` |
| `messages` | `messages`: turns `{"role", "content"}`; maybe `tools` |
| `prompt` | `prompt`, `completion` (or `question`, `answer`): texts, or lists of messages |
| `preference` | `chosen`, `rejected`, maybe `prompt` (or `conversations`, `messages`) and `margin`: texts or turns |
| | texts without a prompt may be whole dialogues (`\\n\\nHuman: …\\n\\nAssistant: …`) |
| | unpaired: a conversation, or a prompt and a completion, with `label` |
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxtune.data.records import Placed, field
from jaxtune.errors import UserError

CHATS = ('alpaca', 'sharegpt', 'messages', 'prompt')
FORMATS = (*CHATS, 'preference')
# The fields of a record that are read, in any of the formats.
CONTENT = ('messages', 'conversations', 'instruction', 'input', 'output', 'history', 'system', 'tools')
CONTENT += ('prompt', 'completion', 'question', 'answer', 'chosen', 'rejected')
ROLES = ('system', 'user', 'assistant', 'tool')

_ROLES = {role: role for role in ROLES} | {
    'human': 'user',
    'gpt': 'assistant',
    'bing': 'assistant',
    'bot': 'assistant',
    'chatgpt': 'assistant',
    'model': 'assistant',
    'function_call': 'assistant',
    'developer': 'system',
    'observation': 'tool',
    'function_response': 'tool',
    'ipython': 'tool',
}

# What the assistant thought before its answer, under the names that there are: the first is what templates read.
REASONING = 'reasoning_content'
_REASONING = (REASONING, 'thinking', 'reasoning')

# Fields that say what is learnt, or how a conversation is rendered, and are not read: the values that change nothing.
_UNREAD_IN_RECORD = {'functions': ([], '')}
_UNREAD_IN_TURN = {'function_call': ({}, '')}
_DEEPEST = 100  # a value within a value
# What a template is given anyway.
RESERVED = ('messages', 'tools', 'documents', 'add_generation_prompt')
_LARGEST = 3e38  # what float32 holds

T = TypeVar('T')


class FormatError(ValueError):
    """A record is not what its format says; the text says what was expected. `kind` groups mistakes for counting."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
      turns: `{"role": one of ROLES, "content": text}`, whether and how much it is trained (`train`, `weight`), further
        keys for templates that read them.
      tools: what the assistant may call: a list of JSON schemas, a text, or None.
      raw: prompt and completion are texts that follow each other as they are, where no template is asked for.
      documents: what the assistant may quote, as the template takes them, or None.
      template_args: what else the template is given, by name.
      scale: of the weights of its turns.
    """

    turns: tuple[dict[str, Any], ...]
    tools: Any = None
    raw: bool = False
    documents: Any = None
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 1.0

    def before(self, index: int) -> 'Chat':
        """The conversation up to a turn."""
        return dataclasses.replace(self, turns=self.turns[:index])

    def weight(self, number: int, marked: bool = False) -> float:
        """How much a turn is trained, 0 = not at all; `marked`: only where `train` is true."""
        turn = self.turns[number]
        return self.scale * turn.get('weight', 1.0) if turn.get('train', not marked) else 0.0


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two conversations that end with the better and the worse answer, and by how much; unpaired data has one only."""

    chosen: Chat | None
    rejected: Chat | None
    margin: float = 0.0


def detect(record: Any) -> str | None:
    """The format of a record by its fields; None if it is none of them."""
    if not isinstance(record, dict):
        return None
    labelled = 'label' in record and any(name in record for name in ('messages', 'conversations', 'prompt'))
    if 'chosen' in record or 'rejected' in record or labelled:
        return 'preference'
    if 'messages' in record:
        return 'messages'
    if 'conversations' in record:
        return 'sharegpt'
    if 'instruction' in record:
        return 'alpaca'
    if 'prompt' in record or 'question' in record:
        return 'prompt'
    return None


def prompt_fields(record: Any) -> tuple[str, str]:
    """The fields of format `prompt` that a record has: prompt and completion."""
    named = isinstance(record, dict) and 'question' in record and 'prompt' not in record
    return ('question', 'answer') if named else ('prompt', 'completion')


def read(records: Iterable[Placed], convert: Callable[[str, Any], T], name: str) -> list[tuple[str, T]]:
    """Converts all records, `(place, converted)`.

    Raises:
      UserError: `file:line` of the first record that cannot be, what was expected, and how many are like it; or there
        are none.
    """
    converted: list[tuple[str, T]] = []
    problems: dict[str, list] = {}
    total = 0
    for place, record in records:
        total += 1
        try:
            converted.append((place, convert(place, record)))
        except FormatError as error:
            problem = problems.setdefault(error.kind, [f'{place}: {error}', 0])
            problem[1] += 1
    for text, count in problems.values():
        raise UserError(f'{text} ({count:,} of {total:,} records are like this)')
    if not total:
        raise UserError(f'{name}: the data is empty; expected at least one record')
    return converted


def find(records: Iterable[Placed], wanted: str, name: str, suits: tuple[str, ...]) -> dict[str, int]:
    """The formats that `data.format` means for these records, with how many are of each; `auto` looks at every record.

    Raises:
      UserError: the format does not suit the objective, or a record is of none that does.
    """
    if wanted != 'auto':
        if wanted not in suits:
            raise UserError(f'data.format={wanted!r}: expected auto or {", ".join(suits)} for this objective')
        return {wanted: sum(1 for _ in records)}
    counts: dict[str, int] = {}
    strange, total = '', 0
    for place, record in records:
        total += 1
        kind = detect(record) or ''
        kind = kind if kind in suits else ''
        counts[kind] = counts.get(kind, 0) + 1
        if not kind and not strange:
            held = ', '.join(map(repr, list(record)[:8])) if isinstance(record, dict) else f'{record!r:.60}'
            strange = f'{place}: data.format=auto: expected the fields of {_fields(suits)}; found {held}'
    if strange:
        raise UserError(f'{strange} ({counts[""]:,} of {total:,} records are like this)')
    return counts


def _fields(suits: tuple[str, ...]) -> str:
    fields = {
        'alpaca': 'instruction and output',
        'sharegpt': 'conversations',
        'messages': 'messages',
        'prompt': 'prompt and completion',
        'preference': 'chosen and rejected',
    }
    return ', '.join(f'{name} ({fields[name]})' for name in suits)


def chat(format_name: str, place: str, record: Any, answered: bool = True) -> Chat:
    """The conversation of a record.

    Args:
      format_name: one of `FORMATS` but `preference`; '' = read off the record.
      place: where the record stands.
      record: what `records.open_records` gave.
      answered: it must hold an assistant's turn; else it may end with the question.

    Raises:
      FormatError: it is not of the format.
    """
    conversation = _READERS[format_name or detect(record) or ''](place, record, answered)
    _check_unread(record, _UNREAD_IN_RECORD, 'the record')
    _check_order(conversation.turns, answered)
    _check_values(conversation)
    return conversation


def _check_unread(fields: Mapping[str, Any], unread: Mapping[str, tuple], where: str) -> None:
    for name, harmless in unread.items():
        if (value := fields.get(name)) is not None and value not in harmless:
            raise FormatError(
                f'unread {name}',
                f'the field {name!r} of {where}, {value!r:.40}, is not read here; expected none, or {harmless[0]!r}',
            )


def _check_values(chat: Chat) -> None:
    """Refuses what is no text of Unicode, and what is nested too deep, wherever it stands."""
    beside = {'tools': chat.tools, 'documents': chat.documents, 'chat_template_kwargs': chat.template_args}
    for turn in (*chat.turns, beside):
        inner = [(name, value, 0) for name, value in turn.items()]
        while inner:
            name, value, depth = inner.pop()
            if isinstance(value, str):
                if not value.isascii():
                    _check_unicode(value, name)
            elif depth > _DEEPEST:
                raise FormatError('deep', f'expected values nested at most {_DEEPEST} deep in {name!r}')
            elif isinstance(value, Mapping):
                inner += [(name, part, depth + 1) for pair in value.items() for part in pair]
            elif isinstance(value, list | tuple):
                inner += [(name, part, depth + 1) for part in value]


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start].encode('unicode_escape').decode()
        raise FormatError(
            'unicode', f'expected Unicode text in {name!r}; found half a surrogate pair, {broken}'
        ) from None


def _get(record: Any, place: str, name: str, kind: type | tuple[type, ...] = str) -> Any:
    try:
        return field(record, place, name, kind=kind)
    except UserError as error:
        raise FormatError(f'field {name}', str(error).removeprefix(f'{place}: ')) from None


def _optional(record: Mapping[str, Any], place: str, name: str) -> str:
    return '' if record.get(name) is None else _get(record, place, name)


def _alpaca(place: str, record: Any, answered: bool) -> Chat:
    turns: list[dict[str, Any]] = []
    instruction = _get(record, place, 'instruction')
    context = _optional(record, place, 'input')
    for pair in record.get('history') or ():
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise FormatError('history', f"expected pairs of texts in 'history'; found {pair!r:.60}")
        _check_unicode(''.join(pair), 'history')
        turns += [_user(pair[0]), {'role': 'assistant', 'content': pair[1]}]
    turns.append(_user(instruction, context))
    if answered or record.get('output') is not None:
        turns.append({'role': 'assistant', 'content': _get(record, place, 'output')})
    return _made(record, place, turns)


def _user(instruction: str, context: str = '') -> dict[str, Any]:
    """A question whose parts the alpaca template shows apart."""
    content = f'{instruction}\n\n{context}' if context else instruction
    return {'role': 'user', 'content': content, 'instruction': instruction, 'input': context}


def _sharegpt(place: str, record: Any, answered: bool) -> Chat:
    return _made(record, place, [_turn(turn, place) for turn in _get(record, place, 'conversations', list)])


def _made(record: Mapping[str, Any], place: str, turns: Sequence[dict[str, Any]], raw: bool = False) -> Chat:
    """A conversation of these turns with what else its record holds."""
    documents, args = record.get('documents'), record.get('chat_template_kwargs')
    for name, value, kind, expected in (
        ('documents', documents, list, 'a list of documents'),
        ('chat_template_kwargs', args, Mapping, 'an object of names and values'),
    ):
        if value is not None and not isinstance(value, kind):
            raise FormatError(f'field {name}', f'expected {expected} in {name!r}; found {value!r:.60}')
    if taken := sorted(set(args or {}) & set(RESERVED)):
        raise FormatError(
            'field chat_template_kwargs', f"'chat_template_kwargs' names {taken[0]!r}, which the record itself holds"
        )
    return Chat(
        _with_system(record, place, turns),
        _tools(record),
        raw,
        documents or None,
        args or {},
        _weight(record, 'the record'),
    )


def _weight(fields: Mapping[str, Any], where: str) -> float:
    weight = fields.get('weight')
    if weight is None:
        return 1.0
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= _LARGEST:
        raise FormatError('weight', f"expected a number of at least 0 in 'weight' of {where}; found {weight!r:.40}")
    return float(weight)


def _with_system(record: Mapping[str, Any], place: str, turns: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The turns after the record's own system prompt, where it has one."""
    system = _optional(record, place, 'system')
    if not system or not turns:
        return tuple(turns)
    if turns[0]['role'] != 'system':
        return ({'role': 'system', 'content': system}, *turns)
    if turns[0]['content'].strip() != system.strip():
        raise FormatError(
            'two systems', f"expected one system prompt; found {system!r:.40} in 'system' and another in the first turn"
        )
    return tuple(turns)


def _tools(record: Mapping[str, Any]) -> Any:
    tools = record.get('tools')
    if tools is not None and not isinstance(tools, str | list | Mapping):
        raise FormatError('field tools', f"expected a list of tools, or a text, in 'tools'; found {tools!r:.60}")
    return None if not tools or (isinstance(tools, str) and tools.strip() in ('', '[]')) else tools


def _messages(place: str, record: Any, answered: bool) -> Chat:
    return _made(record, place, [_turn(turn, place) for turn in _get(record, place, 'messages', list)])


def _prompt(place: str, record: Any, answered: bool) -> Chat:
    asked, written = prompt_fields(record)
    prompt = _get(record, place, asked, (str, list))
    wanted = answered or record.get(written) is not None
    completion = _get(record, place, written, (str, list)) if wanted else []
    return _joined(record, prompt, completion, place)


def _joined(record: Mapping[str, Any], prompt: str | list, completion: str | list | Mapping, place: str) -> Chat:
    """A prompt and its completion, each a text or turns, with the record's system prompt and tools."""
    raw = isinstance(prompt, str) and not isinstance(completion, Mapping)
    turns = [_user(prompt)] if isinstance(prompt, str) else [_turn(turn, place) for turn in prompt]
    if isinstance(completion, str):
        turns.append({'role': 'assistant', 'content': completion})
    else:
        rest = [completion] if isinstance(completion, Mapping) else completion
        turns += [_turn(turn, place) for turn in rest]
        raw = raw and not rest
    return _made(record, place, turns, raw)


_READERS = {'alpaca': _alpaca, 'sharegpt': _sharegpt, 'messages': _messages, 'prompt': _prompt}


def _turn(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise FormatError('turn', f'expected a turn with a role and a text; found {turn!r:.60}')
    key, content_key = ('from', 'value') if 'from' in turn else ('role', 'content')
    name = _get(turn, place, key)
    role = _ROLES.get(name.lower())
    if role is None:
        raise FormatError('role', f'unknown role {name!r:.40}; expected one of {", ".join(_ROLES)}')
    content = turn.get(content_key)
    if isinstance(content, list):  # parts of text, as vision models' data has them
        content = ''.join(_get(part, place, 'text') for part in content)
    elif content is None and turn.get('tool_calls'):
        content = ''
    else:
        content = _get(turn, place, content_key)
    _check_unread(turn, _UNREAD_IN_TURN, 'a turn')
    rest = {name: value for name, value in turn.items() if name not in (key, content_key) and value is not None}
    if 'tool_calls' in rest:
        _check_calls(rest['tool_calls'])
    if not isinstance(rest.get('train', True), bool):
        raise FormatError('train', f"expected true or false in 'train' of a turn; found {rest['train']!r:.40}")
    rest['weight'] = _weight(rest, 'a turn')
    if rest['weight'] == 1.0:
        del rest['weight']
    reasoning = next((rest[name] for name in _REASONING if name in rest), None)
    if reasoning is not None:  # as `transformers` hands it over
        rest = {'thinking': reasoning, **rest, REASONING: reasoning}
    return {'role': role, 'content': content, **rest}


def _check_calls(calls: Any) -> None:
    listed = calls if isinstance(calls, list) else [calls]
    for call in listed:
        function = call.get('function', call) if isinstance(call, dict) else None
        if listed is not calls or not isinstance(function, dict) or not isinstance(function.get('name'), str):
            raise FormatError(
                'calls', f"expected a list of calls in 'tool_calls', each with a function's name; found {call!r:.60}"
            )


def _check_order(turns: tuple[dict[str, Any], ...], answered: bool) -> None:
    first = next((turn['role'] for turn in turns if turn['role'] != 'system'), None)
    if first is None:
        raise FormatError('empty', 'the conversation has no turns; expected a user and an assistant')
    if first != 'user':
        raise FormatError('order', f'the conversation starts with the {first}; expected the user')
    if answered and all(turn['role'] != 'assistant' for turn in turns):
        raise FormatError('answer', 'the conversation has no turn of the assistant; expected one to learn from')


_DIALOGUE = re.compile(r'(?:^|\n\n)(Human|Assistant): ?')


def preference(place: str, record: Any) -> Preference:
    """The pair of a record; without its own prompt, a text is a whole dialogue or a bare answer.

    Raises:
      FormatError: it is not of the format.
    """
    if isinstance(record, dict) and 'label' in record and 'chosen' not in record:
        label = _get(record, place, 'label', (bool, int))
        if label not in (0, 1):
            raise FormatError('label', f"expected true, false, 1 or 0 in 'label'; found {label!r:.40}")
        unlabelled = {name: value for name, value in record.items() if name != 'label'}
        conversation = chat(detect(unlabelled) or 'messages', place, unlabelled)
        return Preference(conversation, None) if label else Preference(None, conversation)
    sides = [_get(record, place, name, (str, list, dict)) for name in ('chosen', 'rejected')]
    _check_unread(record, _UNREAD_IN_RECORD, 'the record')
    margin = _get(record, place, 'margin', (int, float)) if record.get('margin') is not None else 0.0
    if not abs(margin) <= _LARGEST:
        raise FormatError('margin', f"expected a finite number in 'margin'; found {margin!r:.40}")
    chosen, rejected = (_side(record, side, place) for side in sides)
    for side in (chosen, rejected):
        _check_order(side.turns, True)
        _check_values(side)
        if side.turns[-1]['role'] != 'assistant':
            last = side.turns[-1]['role']
            raise FormatError('last', f"expected 'chosen' and 'rejected' to end with the assistant; found the {last}")
    return Preference(chosen, rejected, float(margin))


def _side(record: Mapping[str, Any], answer: str | list | Mapping, place: str) -> Chat:
    key = next((key for key in ('prompt', 'conversations', 'messages') if record.get(key) is not None), '')
    if key:
        prompt = _get(record, place, key, (str, list))
        if isinstance(answer, list) and isinstance(prompt, list) and answer[: len(prompt)] == prompt:
            answer = answer[len(prompt) :]
        return _joined(record, prompt, answer, place)
    if isinstance(answer, str):
        parts = _DIALOGUE.split(answer)
        if len(parts) > 1 and not parts[0].strip():
            roles = {'Human': 'user', 'Assistant': 'assistant'}
            pairs = zip(parts[1::2], parts[2::2], strict=True)
            turns = [{'role': roles[who], 'content': text.strip()} for who, text in pairs]
            return _made(record, place, turns)
        return _joined(record, '', answer, place)
    turns = [_turn(turn, place) for turn in ([answer] if isinstance(answer, Mapping) else answer)]
    return _made(record, place, turns)
