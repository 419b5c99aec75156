"""Chat templates: a conversation as the text that a model reads.

A template is Jinja, as Hugging Face tokenizers carry it, and sees what `transformers` shows it: the conversation, its
tools and the names of special tokens. It runs in a process of its own (`sandbox`). Known names stand for templates
written out here.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from jaxtune.common import paths
from jaxtune.data import sandbox
from jaxtune.data import tool_calls as calls
from jaxtune.data.formats import Chat, FormatError
from jaxtune.errors import UserError

_ALPACA_INPUT = (
    'Below is an instruction that describes a task, paired with an input that provides further context. '
    'Write a response that appropriately completes the request.'
)
_ALPACA = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
_VICUNA = (
    'A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# name -> (the token that ends a turn where the tokenizer has it, else its EOS does; the template). `BOS` and `EOT`
# become texts.
NAMED: dict[str, tuple[str, str]] = {
    'chatml': (
        '<|im_end|>',
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + EOT + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    'llama3': (
        '<|eot_id|>',
        "{{ BOS }}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + m.content|trim + EOT }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    'llama2': (
        '',
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\\n' + m.content|trim + '\\n<</SYS>>\\n\\n' %}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content|trim + ' ' + EOT }}"
        "{% else %}{{ BOS + '[INST] ' + ns.system + m.content|trim + ' [/INST]' }}{% set ns.system = '' %}{% endif %}"
        '{% endfor %}',
    ),
    'mistral': (
        '',
        "{{ BOS }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content|trim + '\\n\\n' %}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content|trim + EOT }}"
        "{% else %}{{ '[INST] ' + ns.system + m.content|trim + ' [/INST]' }}{% set ns.system = '' %}{% endif %}"
        '{% endfor %}',
    ),
    'gemma': (
        '<end_of_turn>',
        "{{ BOS }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content|trim + '\\n\\n' %}"
        "{% else %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' "
        "+ ns.system + m.content|trim + EOT + '\\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
    'phi3': (
        '<|end|>',
        "{{ BOS }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content|trim + EOT + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    'zephyr': (
        '',
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content|trim + EOT + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ),
    'vicuna': (
        '',
        "{% if messages[0].role == 'system' %}{{ BOS + messages[0].content|trim + ' ' }}"
        "{% else %}{{ BOS + '" + _VICUNA.replace("'", "\\'") + " ' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content|trim + EOT }}"
        "{% elif m.role != 'system' %}{{ 'USER: ' + m.content|trim + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    'alpaca': (
        '',
        "{% set ns = namespace(first=true, system='') %}{{ BOS }}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content|trim %}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\\n' + m.content + EOT + '\\n\\n' }}"
        "{% else %}{% if ns.first %}{{ (ns.system or ('" + _ALPACA_INPUT + "' if m.input else '" + _ALPACA + "')) "
        "+ '\\n\\n' }}{% set ns.first = false %}{% endif %}"
        "{{ '### Instruction:\\n' + (m.instruction if m.input else m.content) + '\\n\\n' }}"
        "{% if m.input %}{{ '### Input:\\n' + m.input + '\\n\\n' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
    'plain': (
        '',
        "{{ BOS }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ EOT }}{% endif %}{% endfor %}",
    ),
}


_OURS = ('train', 'weight')  # of a turn: how it is trained

# A text, and where the template marks what the assistant writes in it.
Rendered = tuple[str, list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template that compiles.

    Attributes:
      name: what messages call it: `chatml`, `the tokenizer's`, `data.template`.
      source: its Jinja.
      tokens: the special tokens that it may name, `{"bos_token": text, …}`.
      args: what else it is given, by name (`data.template_args`); `tools` and `documents` for records without.
    """

    name: str
    source: str
    tokens: tuple[tuple[str, str], ...] = ()
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def marks(self) -> bool:
        """Whether it marks what the assistant writes."""
        return bool(re.search(r'\{%[-+]?\s*generation\s*[-+]?%\}', self.source))

    def render(self, chat: Chat, generation_prompt: bool = False) -> str:
        """The conversation as text; with the generation prompt, up to where the assistant writes.

        Raises:
          FormatError: the template refuses the conversation.
          UserError: the template fails, or reaches outside its sandbox.
        """
        return self.render_marked(chat, generation_prompt)[0]

    def render_marked(self, chat: Chat, generation_prompt: bool = False) -> Rendered:
        """The text, and where the template marks what the assistant writes: `(start, end)` in characters."""
        return self.render_all([(chat, generation_prompt)])[0]

    def render_all(self, chats: Sequence[tuple[Chat, bool]]) -> list[Rendered]:
        """`render_marked` of several conversations, each with or without the generation prompt.

        Raises:
          FormatError, UserError: as `render`, for the first that fails.
        """
        rendered = []
        for one in self.try_all(chats):
            if isinstance(one, Exception):
                raise one
            rendered.append(one)
        return rendered

    def try_all(self, chats: Sequence[tuple[Chat, bool]]) -> list[Rendered | FormatError | UserError]:
        """As `render_all`, with the error in the place of what cannot be rendered."""
        results = self._try(chats)
        calling = [i for i, (chat, _) in enumerate(chats) if any(turn.get('tool_calls') for turn in chat.turns)]
        for form in (calls.as_mappings, calls.as_texts):
            unread = [i for i in calling if _misread(chats[i][0], results[i])]
            others = self._try([(form(chats[i][0]), chats[i][1]) for i in unread]) if unread else []
            for i, other in zip(unread, others, strict=True):
                if not _misread(form(chats[i][0]), other):
                    results[i] = other
        return results

    def _try(self, chats: Sequence[tuple[Chat, bool]]) -> list[Rendered | FormatError | UserError]:
        replies = sandbox.render(self.source, [self._variables(*chat) for chat in chats])
        results = [_result(self.name, reply) for reply in replies]
        return results if len(results) == len(chats) else results[:1] * len(chats)

    def reads_tools(self, tools: Any) -> bool:
        """Whether it is handed a conversation's tools; else they stand in the system's turn.

        Those written here do not know tools. Another that does not leaves them out where it serves, too.
        """
        return self.name not in NAMED and isinstance(_parsed(tools), list)

    def _variables(self, chat: Chat, generation_prompt: bool) -> dict[str, Any]:
        turns = [{name: value for name, value in turn.items() if name not in _OURS} for turn in chat.turns]
        tools = self.args.get('tools') if chat.tools is None else chat.tools
        documents = self.args.get('documents') if chat.documents is None else chat.documents
        if tools is not None:
            if self.reads_tools(tools):
                tools = _parsed(tools)
            else:
                turns, tools = _with_tools(turns, tools), None
        variables = {'messages': turns, 'tools': tools, 'documents': documents}
        own = {**self.args, **chat.template_args}
        return {**dict(self.tokens), **own, **variables, 'add_generation_prompt': generation_prompt}


def _result(name: str, reply: dict[str, Any]) -> Rendered | FormatError | UserError:
    """What the sandbox answered, as a rendering or as the error to raise."""
    if 'text' in reply:
        return reply['text'], [tuple(span) for span in reply['spans']]
    kind, message = reply['error'], reply['message']
    if kind == 'syntax':
        return UserError(f'data.template: {name} template, {message}')
    if kind == 'refuses':
        return FormatError('template', f'{name} template refuses the conversation: {message}')
    if kind == 'fails':
        return FormatError('template', f'{name} template fails: {message}')
    reasons = {'compile': 'cannot be compiled: ', 'sandbox': 'reaches outside its sandbox: ', 'limit': ''}
    return UserError(f'data.template: {name} template {reasons[kind]}{message}')


def _misread(chat: Chat, result: Rendered | FormatError | UserError) -> bool:
    """Whether a template takes the arguments of tool calls in another form: it fails, or writes them as no JSON."""
    return isinstance(result, Exception) or calls.misread(chat, result[0])


def _parsed(tools: Any) -> Any:
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except ValueError:
        return tools


def _with_tools(turns: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """The tools in the system's turn, for templates that do not know them."""
    text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    if turns and turns[0]['role'] == 'system':
        return [turns[0] | {'content': f'{turns[0]["content"]}\n\nTools: {text}'}, *turns[1:]]
    return [{'role': 'system', 'content': f'Tools: {text}'}, *turns]


def open_template(
    wanted: str,
    tokenizer: PreTrainedTokenizerBase,
    format_name: str = '',
    raw: bool = False,
    args: Mapping[str, Any] | None = None,
) -> Template:
    """The template that `data.template` means.

    Args:
      wanted: `auto`, a name, a Jinja text, or a file that holds one. `auto` is the tokenizer's own; where it has none,
        `plain` for records that are texts, `alpaca` for that format, else `chatml`.
      tokenizer: whose special tokens it may name.
      format_name: of the data, for `auto`.
      raw: the records are texts, for `auto`.
      args: what else the template is given (`data.template_args`).

    Raises:
      UserError: no such template, one that does not compile, or a named one for a tokenizer without EOS.
    """
    if taken := sorted({'messages', 'add_generation_prompt'} & set(args or {})):
        raise UserError(f'data.template_args.{taken[0]}: expected another name: the template is given this one anyway')
    return dataclasses.replace(_open(wanted, tokenizer, format_name, raw), args=args or {})


def _open(wanted: str, tokenizer: PreTrainedTokenizerBase, format_name: str, raw: bool) -> Template:
    if wanted == 'auto':
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get('default') or next(iter(own.values()), None)
        if own:
            known = (name for name in NAMED if _named(name, tokenizer) == own)
            return _checked(Template(next(known, "the tokenizer's own"), own, _tokens(tokenizer)))
        wanted = 'plain' if raw else 'alpaca' if format_name == 'alpaca' else 'chatml'
    if wanted in NAMED:
        source = _named(wanted, tokenizer)
        if source is None:
            raise UserError(f'data.template={wanted}: the tokenizer has no EOS to end a turn with; expected one')
        return _checked(Template(wanted, source, _tokens(tokenizer)))
    if '{' in wanted:
        return _checked(Template('the given', wanted, _tokens(tokenizer)))
    check_wanted(wanted)
    path = paths.local(wanted, 'data.template')
    try:
        return _checked(Template(str(path), path.read_text('utf-8'), _tokens(tokenizer)))
    except UnicodeDecodeError as error:
        raise UserError(f'data.template={wanted}: expected a Jinja text in UTF-8: {error}') from None


def check_wanted(wanted: str) -> None:
    """Refuses a template that is none: no name, no Jinja text, no file.

    Raises:
      UserError: so it is.
    """
    if wanted in ('auto', *NAMED) or '{' in wanted or paths.local(wanted, 'data.template').is_file():
        return
    near = difflib.get_close_matches(wanted, NAMED, 1)
    raise UserError(
        f'data.template={wanted!r}: expected auto, a Jinja text, a file, or one of {", ".join(NAMED)}'
        + (f' (nearest: {near[0]})' if near else '')
    )


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja of a named template for a tokenizer; None where it has nothing to end a turn with."""
    end, source = NAMED[name]
    end = end if end and end in tokenizer.get_vocab() else tokenizer.eos_token
    if not end:
        return None
    source = re.sub(r'\bBOS\b', lambda _: repr(_bos(tokenizer)), source)
    return re.sub(r'\bEOT\b', lambda _: repr(end), source)


def unknown_marks(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The marks of turns that a template writes and that are no tokens of the tokenizer's: it cuts them in pieces."""
    vocab = tokenizer.get_vocab()
    return [
        mark for mark in dict.fromkeys(re.findall(r'<\|\w+\|>|<\w+_of_turn>', template.source)) if mark not in vocab
    ]


def _checked(template: Template) -> Template:
    if not isinstance(template.source, str):
        raise UserError(f'data.template: {template.name} template: expected a text, found {template.source!r:.60}')
    _check(template.source, template.name)
    return template


@functools.lru_cache(maxsize=64)
def _check(source: str, name: str) -> None:
    for problem in sandbox.render(source, []):
        raise _result(name, problem)  # pyright: ignore[reportGeneralTypeIssues]: nothing is rendered, so all are errors


def _tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    """The special tokens that a template may name, as `transformers` hands them over: those that there are."""
    return tuple(tokenizer.special_tokens_map.items())


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer begins a text with."""
    first = tokenizer('a').input_ids[:1]
    bos: Any = tokenizer.bos_token
    return bos if first and first[0] == tokenizer.bos_token_id and bos else ''
