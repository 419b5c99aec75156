"""Chat templates: a conversation as the text that a model reads.

A template is Jinja, as Hugging Face tokenizers carry it, and runs in Jinja's immutable sandbox: it sees the
conversation and nothing else. Known names stand for templates written out here.
"""

import dataclasses
import datetime
import difflib
import functools
import json
import pathlib
import re
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from jaxtune.data.formats import Chat, FormatError
from jaxtune.errors import UserError

# Private characters that stand around what `{% generation %}` marks, until the text is made.
_OPEN, _CLOSE = '\U000ffff0', '\U000ffff1'

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


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant writes."""

    tags = {'generation'}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        call = self.call_method('_mark')
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return _OPEN + caller() + _CLOSE


def _raise_exception(message: str):
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters['tojson'] = _tojson
    environment.globals['raise_exception'] = _raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    return environment


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template that compiles.

    Attributes:
      name: what messages call it: `chatml`, `the tokenizer's`, `data.template`.
      source: its Jinja.
      tokens: the special tokens that it may name, `{"bos_token": text, …}`.
    """

    name: str
    source: str
    tokens: tuple[tuple[str, str], ...] = ()

    @property
    def marks(self) -> bool:
        """Whether it marks what the assistant writes."""
        return bool(re.search(r'\{%-?\s*generation\s*-?%\}', self.source))

    def render(self, chat: Chat, generation_prompt: bool = False) -> str:
        """The conversation as text; with the generation prompt, up to where the assistant writes.

        Raises:
          FormatError: the template refuses the conversation.
          UserError: the template fails, or reaches outside its sandbox.
        """
        return self.render_marked(chat, generation_prompt)[0]

    def render_marked(self, chat: Chat, generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where the template marks what the assistant writes: `(start, end)` in characters."""
        turns, tools = list(chat.turns), chat.tools
        if tools is not None:
            tools = _parsed(tools)
            if 'tools' not in self.source or not isinstance(tools, list):
                turns, tools = _with_tools(turns, chat.tools), None
        variables = dict(self.tokens) | {'messages': turns, 'add_generation_prompt': generation_prompt}
        if tools is not None:
            variables['tools'] = tools
        try:
            text = _compiled(self.source, self.name).render(**variables)
        except SecurityError as error:
            raise UserError(f'data.template: {self.name} template reaches outside its sandbox: {error}') from None
        except jinja2.exceptions.TemplateError as error:
            raise FormatError('template', f'{self.name} template refuses the conversation: {error}') from None
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
            raise FormatError('template', f'{self.name} template fails: {type(error).__name__}: {error}') from None
        return _take_marks(text)


def _take_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    parts, spans, at, start = [], [], 0, 0
    for part in re.split(f'([{_OPEN}{_CLOSE}])', text):
        if part == _OPEN:
            start = at
        elif part == _CLOSE:
            spans.append((start, at))
        else:
            parts.append(part)
            at += len(part)
    return ''.join(parts), spans


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


@functools.lru_cache(maxsize=64)
def _compiled(source: str, name: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise UserError(f'data.template: {name} template, line {error.lineno}: {error.message}') from None


def open_template(wanted: str, tokenizer, format_name: str = '', raw: bool = False) -> Template:
    """The template that `data.template` means.

    Args:
      wanted: `auto`, a name, a Jinja text, or a file that holds one. `auto` is the tokenizer's own; where it has none,
        `plain` for records that are texts, `alpaca` for that format, else `chatml`.
      tokenizer: whose special tokens it may name.
      format_name: of the data, for `auto`.
      raw: the records are texts, for `auto`.

    Raises:
      UserError: no such template, one that does not compile, or a named one for a tokenizer without EOS.
    """
    if wanted == 'auto':
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get('default') or next(iter(own.values()))
        if own:
            known = (name for name in NAMED if _named(name, tokenizer) == own)
            name = next(known, '')
            return _checked(Template(f"the tokenizer's own {name}".rstrip(), own, _tokens(tokenizer)))
        wanted = 'plain' if raw else 'alpaca' if format_name == 'alpaca' else 'chatml'
    if wanted in NAMED:
        source = _named(wanted, tokenizer)
        if source is None:
            raise UserError(f'data.template={wanted}: the tokenizer has no EOS to end a turn with; expected one')
        return _checked(Template(wanted, source, _tokens(tokenizer)))
    if '{' in wanted:
        return _checked(Template('the given', wanted, _tokens(tokenizer)))
    path = pathlib.Path(wanted).expanduser()
    if path.is_file():
        return _checked(Template(str(path), path.read_text('utf-8'), _tokens(tokenizer)))
    near = difflib.get_close_matches(wanted, NAMED, 1)
    raise UserError(
        f'data.template={wanted!r}: expected auto, a Jinja text, a file, or one of {", ".join(NAMED)}'
        + (f' (nearest: {near[0]})' if near else '')
    )


def _named(name: str, tokenizer) -> str | None:
    """The Jinja of a named template for a tokenizer; None where it has nothing to end a turn with."""
    end, source = NAMED[name]
    end = end if end and end in tokenizer.get_vocab() else tokenizer.eos_token
    if not end:
        return None
    source = re.sub(r'\bBOS\b', lambda _: repr(_bos(tokenizer)), source)
    return re.sub(r'\bEOT\b', lambda _: repr(end), source)


def _checked(template: Template) -> Template:
    _compiled(template.source, template.name)
    return template


def _tokens(tokenizer) -> tuple[tuple[str, str], ...]:
    names = ('bos_token', 'eos_token', 'pad_token', 'unk_token')
    return tuple((name, str(getattr(tokenizer, name) or '')) for name in names)


def _bos(tokenizer) -> str:
    """What the tokenizer begins a text with."""
    first = tokenizer('a').input_ids[:1]
    return tokenizer.bos_token if first and first[0] == tokenizer.bos_token_id and tokenizer.bos_token else ''
