"""Blocks of thinking in a text, `<think> … </think>` and their like: what opens, closes and fills them."""

import re

_TAG = r'(?:<(?P<angle>[\w:]+)>|\[(?P<square>\w+)\])'
_CLOSING = r'(?(angle)</(?P=angle)>|\[/(?P=square)\])'
_EMPTY = re.compile(rf'\s*{_TAG}\s*{_CLOSING}\n*')
_OPENED = re.compile(rf'{_TAG}\s*\Z')
_END = '</think>'


def empty_block(text: str) -> int:
    """How many characters at the beginning of a text are a block without a thought, with the lines after it."""
    match = _EMPTY.match(text)
    return match.end() if match else 0


def opened(prompt: str) -> tuple[str, str] | None:
    """The tag that a prompt ends with, left open, and the one that closes it: `('<think>', '</think>')`."""
    match = _OPENED.search(prompt, max(0, len(prompt) - 64))
    if match is None or prompt[match.start() :].startswith(('</', '[/')):
        return None
    name = match['angle'] or match['square']
    return (f'<{name}>', f'</{name}>') if match['angle'] else (f'[{name}]', f'[/{name}]')


def split(content: str) -> tuple[str, str]:
    """The thought that a text begins with, and the rest; `('', text)` where there is none."""
    thought, end, answer = content.rpartition(_END)
    return (thought.strip().removeprefix('<think>').strip(), answer.strip()) if end else ('', content)
