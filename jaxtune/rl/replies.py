"""An environment's replies as the tokens that stand between two turns of a policy."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import Template
from jaxtune.data.tokenise import tokenise
from jaxtune.errors import UserError

_SENTINEL = 'Zq7vTurnK3x'  # no conversation holds it, and no template strips letters and digits
MODEL, ENVIRONMENT = 'model', 'environment'  # who writes


class Part(NamedTuple):
    """A part of an exchange.

    Attributes:
      who: wrote it: `MODEL` or `ENVIRONMENT`.
      text: of it.
      whole: a turn ends after it.
    """

    who: str
    text: str
    whole: bool


@dataclasses.dataclass(frozen=True)
class ReplyEncoder:
    """Encodes replies.

    Attributes:
      tokenizer: makes the tokens.
      template: of conversations; None where no prompt is one.
      role: of a reply's turn.
      vocab_size: rows of the model.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    role: str
    vocab_size: int

    def text(self, text: str) -> list[int]:
        """The tokens of a text that follows others.

        Raises:
          ValueError: the model has no row for one of them.
        """
        before = 'a\n'
        ids, covers = tokenise(self.tokenizer, before + text, [len(before)], cut=True)
        ids = [token for token, (start, _) in zip(ids, covers.tolist(), strict=True) if start >= len(before)]
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(tokenizers.no_row(self.tokenizer, max(ids), self.vocab_size))
        return ids

    def turn(self, asked: Sequence[Any], parts: Sequence[Part], text: str, last: int) -> list[int]:
        """The tokens of a reply as a turn of its own, up to where the assistant writes again.

        They are what the template writes after an assistant's turn that a turn of the environment follows, less what
        ends the former, which the policy wrote itself.

        Args:
          asked: the turns of the prompt.
          parts: who wrote what since, the policy's turn last.
          text: the reply.
          last: the token that the policy ended its turn with.

        Raises:
          ValueError: the template refuses such a turn, or the model has no row for one of the tokens.
        """
        assert self.template is not None  # as there is a conversation
        past = self._turns(parts)[:-1]  # the last is the one that this turn ends
        turns = [*asked, *past, {'role': 'assistant', 'content': _SENTINEL}]
        problem = ''
        for role in dict.fromkeys((self.role, 'user')):
            chat = Chat((*turns, {'role': role, 'content': text}))
            try:
                rendered = self.template.render(chat, True)
            except (FormatError, UserError) as error:
                problem = problem or str(error)
                continue
            _, found, after = rendered.rpartition(_SENTINEL)
            if not found or text.strip() not in after:
                problem = problem or f'{self.template.name} template does not write a turn of {role}'
                continue
            end = self._end(after, last)
            return self.text(after[end:])
        raise ValueError(f'the reply {text!r:.60} cannot be a turn: {problem}')

    def _end(self, after: str, last: int) -> int:
        """Where what ends the assistant's turn ends in what follows its text."""
        mark: Any = self.tokenizer.convert_ids_to_tokens(last)
        place = after.find(mark)
        return place + len(mark) if place >= 0 and not after[:place].strip() else 0

    def _turns(self, parts: Sequence[Part]) -> list[dict[str, str]]:
        """What was written before, as turns; a reply that goes on in the assistant's stands there."""
        turns: list[dict[str, str]] = []
        whole = True
        for part in parts:
            if whole:
                role = 'assistant' if part.who == MODEL else self.role
                turns.append({'role': role, 'content': part.text})
            else:
                turns[-1]['content'] += part.text
            whole = part.whole
        return turns
