"""Which tokens of a conversation are trained: what the assistant writes when served, with the token that ends its turn.

The ids before an answer are exactly those of what the model reads when it is asked for it (`data.chat_answers`). Where
the next prompt goes on from an answer, both stand in one row; where the template shows its past in another way
then, the next answer is a row of its own. No token lies across the edge of an answer: the text is cut there, and every
token of the answer counts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data import turns
from jaxtune.data.chat_answers import Answer, AnswerReader
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import Template
from jaxtune.data.tokenise import tokenise
from jaxtune.errors import UserError


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A row of a conversation as tokens.

    Attributes:
      ids: `[tokens]` int32.
      assistant_mask: `[tokens]` float32, the weight of a trained token, 0 = not trained.
    """

    ids: np.ndarray
    assistant_mask: np.ndarray


class ChatEncoder:
    """Encodes conversations with a template.

    Args:
      template: makes the text.
      tokenizer: makes the tokens.
      train_on: which answers are trained: `all` but those with `train: false`, `last` alone, or those `marked` with
        `train: true`.
      skip: this many turns at the start (demonstrations) are never trained.
      vocab_size: rows of the model; a conversation with a token that has none is refused. 0 = not known.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        train_on: str = 'all',
        skip: int = 0,
        vocab_size: int = 0,
    ) -> None:
        self.template, self.tokenizer, self.train_on, self.skip = template, tokenizer, train_on, skip
        self.vocab_size = vocab_size
        self._reader = AnswerReader(template, tokenizer)

    def __call__(self, chat: Chat) -> list[Encoded]:
        """The rows of a conversation; what follows its last trained answer is left out.

        Raises:
          FormatError: the template refuses the conversation, or leaves some of it out.
          UserError: the template cannot be trained with.
        """
        rows = next(self.many([chat]))
        if isinstance(rows, Exception):
            raise rows
        return rows

    def many(self, chats: Sequence[Chat]) -> Iterator[list[Encoded] | FormatError | UserError]:
        """The rows of several conversations, rendered at once; the error of `__call__` in the place of its own."""
        wanted = [self._trained_turns(chat) for chat in chats]
        for chat, answers in zip(chats, self._reader.answers(list(zip(chats, wanted, strict=True))), strict=True):
            rows = answers if isinstance(answers, Exception) else self._rows(chat, answers)
            lacks = '' if isinstance(rows, Exception) else self._lacks([token for row in rows for token in row.ids])
            yield FormatError('rows', lacks) if lacks else rows

    def _trained_turns(self, chat: Chat) -> list[int]:
        """The turns that are trained."""
        answers = [i for i, turn in enumerate(chat.turns) if turn['role'] == 'assistant' and i >= self.skip]
        answers = answers[-1:] if self.train_on == 'last' else answers
        return [number for number in answers if chat.weight(number, marked=self.train_on == 'marked') > 0]

    def _rows(self, chat: Chat, answers: Sequence[Answer]) -> list[Encoded]:
        rows: list[_Row] = []
        for answer in answers:
            ids = tokenise(self.tokenizer, answer.prompt, ())[0]
            if not (rows and rows[-1].ended and ids[: len(rows[-1].ids)] == rows[-1].ids):
                rows.append(_Row([], []))
            row, weight = rows[-1], chat.weight(answer.turn)
            written, mask = self._written(answer, ids)
            row.mask += [0.0] * (len(ids) - len(row.ids)) + [weight * one for one in mask]
            row.ids, row.ended, row.weight = ids + written, answer.ended, weight
        return [
            Encoded(np.asarray(row.ids, np.int32), np.asarray(row.mask, np.float32)) for row in map(self._finish, rows)
        ]

    def _written(self, answer: Answer, prompt: list[int]) -> tuple[list[int], list[float]]:
        """The ids of what the model writes after these, and which of them are trained."""
        start, text = len(answer.prompt), answer.prompt + answer.completion
        edges = [start, *(start + edge for span in answer.spans for edge in span)]
        ids, covers = tokenise(self.tokenizer, text, edges)
        if ids[: len(prompt)] != prompt:
            ids, covers = tokenise(self.tokenizer, text, edges, cut=True)
            assert ids[: len(prompt)] == prompt  # a piece by itself is what the prompt is
        covers = covers[len(prompt) :] - start
        mask = np.zeros(len(covers), np.float32)
        for low, high in answer.spans:
            mask[(covers[:, 0] >= low) & (covers[:, 1] <= high) & (covers[:, 1] > covers[:, 0])] = 1.0
        return ids[len(prompt) :], mask.tolist()

    def _finish(self, row: '_Row') -> '_Row':
        """A row whose last answer no token ends gets EOS."""
        eos: Any = self.tokenizer.eos_token_id
        if not row.ended and eos is not None:
            row.ids.append(eos)
            row.mask.append(row.weight)
        return row

    def _lacks(self, ids: Sequence[int]) -> str:
        """What is wrong with ids for which the model has no rows; '' where nothing is."""
        largest = int(max(ids, default=0))
        beyond = 0 < self.vocab_size <= largest
        return tokenizers.no_row(self.tokenizer, largest, self.vocab_size) if beyond else ''

    def prompt(self, chat: Chat) -> tuple[str, list[int]]:
        """Text and ids of a conversation up to where the assistant writes.

        Raises:
          FormatError: the template refuses the conversation, or leaves a tool call out.
          UserError: the template fails.
        """
        text = self.template.render(chat, True)
        turns.check(self.template, [turns.Rendered(chat, True, text)])
        ids = tokenise(self.tokenizer, text, ())[0]
        if lacks := self._lacks(ids):
            raise FormatError('rows', lacks)
        return text, ids

    def end_token(self) -> str | None:
        """The token that ends an answer; None where the template does not write one."""
        return self._reader.end_token()


@dataclasses.dataclass
class _Row:
    ids: list[int]
    mask: list[float]
    ended: bool = False
    weight: float = 0.0


def end_of_turn(template: Template, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer; None if it is not one token."""
    try:
        token = ChatEncoder(template, tokenizer).end_token()
    except UserError:
        return None  # a template that cannot be trained with can still be used for generation
    token_id: Any = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return token_id
