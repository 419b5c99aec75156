"""Tokens as the text that a reader sees, piece by piece: no half characters, and nothing of a text that ends it."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from jaxtune.generation.engine import Alternatives
from jaxtune.generation.generator import decode_continuation

_BEFORE = 16  # tokens before new ones that what they add to the text may depend on
_HELD = 64  # tokens that may wait for the rest of a character: no character has so many
_UNKNOWN = '\N{REPLACEMENT CHARACTER}'


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
      id: its number.
      logprob: its log-probability; None of a text's first token, which nothing predicts.
      alternatives: the likeliest tokens in its place.
      start: characters of the text before it.
    """

    id: int
    logprob: float | None
    alternatives: Alternatives
    start: int


class Writer:
    """The text of one answer.

    Args:
      tokenizer: that of the model.
      prompt: the tokens before the answer.
      stops: texts that end it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids = list(prompt[-_BEFORE:])  # the window that new tokens are decoded in
        self._old = len(self._ids)  # of it, those whose text is known
        self._known, self._text = 0, ''  # characters of the new ones' text that are in `_text`: all text so far
        self._given = 0  # characters that were handed out
        self._tokens: list[Token] = []  # that were not
        self.stopped = False

    def write(self, token: int, logprob: float | None, alternatives: Alternatives) -> None:
        """Takes the next token; nothing after a stop text."""
        if self.stopped:
            return
        self._tokens.append(Token(token, logprob, alternatives, len(self._text)))
        self._ids.append(token)
        new = decode_continuation(self._tokenizer, self._ids[: self._old], self._ids[self._old :])
        whole = new.rstrip(_UNKNOWN) if len(self._ids) - self._old < _HELD else new
        self._take(whole[self._known :])
        self._known = max(self._known, len(whole))
        if whole == new:
            self._ids, self._known = self._ids[-_BEFORE:], 0
            self._old = len(self._ids)

    def end(self) -> None:
        """Takes what was held back of an incomplete character."""
        if not self.stopped:
            new = decode_continuation(self._tokenizer, self._ids[: self._old], self._ids[self._old :])
            self._take(new[self._known :])
            self._known = len(new)

    def take(self, ended: bool = False) -> tuple[str, list[Token]]:
        """The text that may be shown now and was not yet, and the tokens that made it; `ended`: all that is left."""
        until = len(self._text) if ended or self.stopped else len(self._text) - self._begun()
        text, self._given = self._text[self._given : until], max(self._given, until)
        if self.stopped:
            tokens = [token for token in self._tokens if token.start < until]
        elif ended:
            tokens = self._tokens
        else:
            complete = len(self._tokens) - (len(self._ids) - self._old)
            tokens = [
                token
                for token, end in zip(self._tokens[:complete], self._ends()[:complete], strict=True)
                if end <= until
            ]
        self._tokens = self._tokens[len(tokens) :]
        return text, tokens

    def _ends(self) -> list[int]:
        """Where the text of each token ends that was not handed out; of parts of a character, where that ends."""
        ends, end, following = [], len(self._text), len(self._text)
        for token in reversed(self._tokens):
            end = following if following > token.start else end
            following = token.start
            ends.append(end)
        return ends[::-1]

    def _take(self, new: str) -> None:
        """Puts text after that so far, up to the stop text in it that ends first."""
        seen = len(self._text)
        self._text += new
        found = []
        for stop in self._stops:
            at = self._text.find(stop, max(self._given, seen - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at))
        if found:
            self._text, self.stopped = self._text[: min(found)[1]], True

    def _begun(self) -> int:
        """Characters at the end of the text that a stop text may begin with."""
        most = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(most, len(self._text) - self._given), 0, -1):
            if any(stop.startswith(self._text[-count:]) for stop in self._stops):
                return count
        return 0


class Names:
    """What tokens are called, each looked up once.

    Args:
      tokenizer: that of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """A token's text, or `bytes:` and its bytes where they are none, and the bytes."""
        if token not in self._known:
            self._known[token] = self._name(token)
        return self._known[token]

    def _name(self, token: int) -> tuple[str, list[int]]:
        text = self._tokenizer.decode([token])
        raw = self._tokenizer.convert_ids_to_tokens(token) or ''
        if _UNKNOWN not in text:
            return text, list(text.encode())
        byte = re.fullmatch('<0x([0-9A-F]{2})>', raw)
        alphabet = _byte_alphabet()
        if byte:
            data = [int(byte[1], 16)]
        elif all(character in alphabet for character in raw):
            data = [alphabet[character] for character in raw]
        else:
            return text, list(text.encode())
        return 'bytes:' + ''.join(f'\\x{one:02x}' for one in data), data


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Characters that byte-level BPE writes bytes as (Radford et al. 2019)."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
