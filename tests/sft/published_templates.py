"""Chat templates of the structure that published models have, in small wording of our own.

Each has what makes its model's template hard: what it does to turns that lie in the past, where thinking goes, where
the system prompt and the tools are put, how calls are written, what ends a turn.
"""
# ruff: noqa: E501  # a template is read as it stands

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """A template, the tokens that its tokenizer has, and its EOS."""

    source: str
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    args: tuple[tuple[str, object], ...] = ()


_CALL = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'

# A date and the tools stand in the first turns; calls are bare JSON; results are turns of `ipython`.
LLAMA3 = (
    "{{ bos_token }}{% set date = date_string or '26 Jul 2024' %}{% set first = 0 %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date }}"
    "{% if messages[0].role == 'system' %}{% set first = 1 %}{{ '\n' + messages[0].content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% for m in messages[first:] %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{{ 'Functions: ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\n' }}"
    "{% endif %}{{ m.content | trim + '<|eot_id|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set call = m.tool_calls[0] %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    + _CALL
    + "{{ '<|eot_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    '{% endif %}{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}{{ '# Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
)
_CHATML_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}" + _CALL + "{{ '\n</tool_call>' }}{% endfor %}"
)
_CHATML_TOOL = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
QWEN25 = (
    _CHATML_HEAD
    + "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    + "{{ '<|im_start|>assistant' }}{% if m.content or not m.tool_calls %}{{ '\n' + m.content }}{% endif %}"
    + _CHATML_CALLS
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    + _CHATML_TOOL
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thinking of turns before the last question is dropped; the last answer gets an empty block where it has none.
_LAST_QUESTION = (
    '{% set ns = namespace(last=-1) %}{% for m in messages %}'
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_THOUGHT = (
    "{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3 = (
    _CHATML_HEAD
    + _LAST_QUESTION
    + "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    + _THOUGHT
    + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    + "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    + _CHATML_CALLS
    + "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    + _CHATML_TOOL
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As the one before, but what it asks for begins with an opened block.
QWEN35 = QWEN3.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}",
)
# The system prompt and the tools stand before the last question, wherever that is.
_MISTRAL = (
    "{% set system = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    '{% set system = messages[0].content %}{% set turns = messages[1:] %}{% endif %}{{ bos_token }}'
    "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS]SPACE' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if system and loop.last %}{{ '[INST]SPACE' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST]SPACE' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]SPACE[' }}{% for call in m.tool_calls %}"
    + _CALL
    + "{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ 'SPACE' + m.content | trim + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]SPACE' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
MISTRAL = _MISTRAL.replace('SPACE', ' ')
TEKKEN = _MISTRAL.replace('SPACE', '')
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set lead = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set lead = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (lead if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# An EOS after the last turn only; no tools.
PHI3 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Tools stand in the system's turn.
PHI4 = (
    "{% for m in messages %}{% if m.role == 'system' and tools %}"
    "{{ '<|system|>' + m.content + '<|tool|>' + (tools | tojson) + '<|/tool|><|end|>' }}"
    "{% elif m.tool_calls %}{{ '<|assistant|>' + m.content + '<|tool_call|>' + (m.tool_calls | tojson) + '<|/tool_call|><|end|>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Thinking is cut away from every answer, and opened when one is asked for.
R1 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' and m.tool_calls %}"
    "{{ '<|Assistant|>' }}{% for call in m.tool_calls %}{{ '<|call|>' + call.function.name + '\n```json\n' "
    "+ call.function.arguments + '\n```' }}{% endfor %}{{ '<|end_of_sentence|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|output|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
R1_OLD = R1.replace('<|Assistant|><think>\n', '<|Assistant|>')
COMMAND_R = (
    "{{ bos_token }}{% set turns = messages %}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{{ '<|START|><|SYSTEM|>' + messages[0].content + '<|END|>' }}{% endif %}{% for m in turns %}"
    "{{ '<|START|>' + ('<|USER|>' if m.role == 'user' else '<|CHATBOT|>') + m.content | trim + '<|END|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}"
)
# Channels; thinking of past answers is dropped; another token ends the last turn than ends it in the past.
HARMONY = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{% set turns = messages %}{% if messages[0].role == 'system' or tools %}{{ '<|start|>developer<|message|>' }}"
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}{{ '\n# Tools\n' + (tools | tojson) }}{% endif %}{{ '<|end|>' }}{% endif %}"
    "{% for m in turns %}{% if m.role == 'assistant' %}{% if m.tool_calls %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start|>assistant to=functions.' + call.name "
    "+ '<|channel|>commentary json<|message|>' + (call.arguments | tojson) + '<|call|>' }}"
    '{% elif loop.last and not add_generation_prompt %}'
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.tool to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# No token of its own ends a turn: the next one's header does.
GLM4 = (
    "[gMASK]<sop>{% if tools %}{{ '<|system|>\nTools: ' + (tools | tojson) }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ '<|assistant|>' + call.function.name + '\n' "
    "+ (call.function.arguments | tojson) }}{% endfor %}{% elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# It marks whole turns; without thinking, what is asked for holds an empty block.
SMOLLM3 = (
    "{% set thinks = enable_thinking is not defined or enable_thinking %}{{ '<|im_start|>system\nThinking: ' }}"
    "{{ 'on' if thinks else 'off' }}{% if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}"
    "{% if tools %}{{ '\nTools: ' + (tools | tojson) }}{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{% generation %}{% if thinks %}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}"
    "{% endgeneration %}{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)

_CHATML = ('<|im_start|>', '<|im_end|>')
_HARMONY = ('<|start|>', '<|message|>', '<|channel|>', '<|end|>', '<|call|>')
_OFF = (('enable_thinking', False),)

PUBLISHED = {
    'llama3': Published(
        LLAMA3,
        ('<|start_header_id|>', '<|end_header_id|>'),
        '<|eot_id|>',
        '<|begin|>',
        (('date_string', '1 May 2026'),),
    ),
    'qwen2.5': Published(QWEN25, _CHATML, '<|im_end|>'),
    'qwen3': Published(QWEN3, _CHATML, '<|im_end|>'),
    'qwen3, no thinking': Published(QWEN3, _CHATML, '<|im_end|>', args=_OFF),
    'qwen3.5': Published(QWEN35, (*_CHATML, '<think>', '</think>'), '<|im_end|>'),
    'qwen3.5, no thinking': Published(QWEN35, (*_CHATML, '<think>', '</think>'), '<|im_end|>', args=_OFF),
    'mistral v0.3': Published(MISTRAL, ('[INST]', '[/INST]', '[TOOL_CALLS]'), '</s>', '<s>'),
    'mistral tekken': Published(TEKKEN, ('[INST]', '[/INST]', '[TOOL_CALLS]'), '</s>', '<s>'),
    'gemma': Published(GEMMA, ('<start_of_turn>', '<end_of_turn>'), '<eos>', '<bos>'),
    'gemma3': Published(GEMMA3, ('<start_of_turn>', '<end_of_turn>'), '<eos>', '<bos>'),
    'phi3': Published(PHI3, ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>'), '<|endoftext|>'),
    'phi4': Published(PHI4, ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>', '<|tool_call|>'), '<|endoftext|>'),
    'deepseek r1': Published(R1, ('<|User|>', '<|Assistant|>', '<think>'), '<|end_of_sentence|>', '<|begin|>'),
    'deepseek r1, first': Published(R1_OLD, ('<|User|>', '<|Assistant|>'), '<|end_of_sentence|>', '<|begin|>'),
    'command-r': Published(COMMAND_R, ('<|START|>', '<|USER|>', '<|CHATBOT|>'), '<|END|>', '<BOS>'),
    'gpt-oss': Published(HARMONY, _HARMONY, '<|return|>'),
    'glm-4': Published(GLM4, ('[gMASK]', '<sop>', '<|user|>', '<|assistant|>', '<|observation|>'), '<|endoftext|>'),
    'smollm3': Published(SMOLLM3, _CHATML, '<|im_end|>'),
    'smollm3, no thinking': Published(SMOLLM3, _CHATML, '<|im_end|>', args=_OFF),
}
