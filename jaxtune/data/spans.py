"""Which tokens of a conversation are trained: what the assistant wrote, with the token that ends its turn.

Few templates mark it (`{% generation %}`). Where one does not, the spans are found by rendering the conversation up to
before and after each answer: each text must begin with the one before it, else the template rewrites earlier turns and
no span can be trusted. Where an answer ends is known from what the template writes after another one in its place, a
word that stands nowhere else: the letters of an answer say nothing about it. Spans of characters become spans of tokens
by the tokenizer's offsets; where a token would lie across an edge, the text is cut there and both sides are tokenised
by themselves: then the prompt's tokens are those that the model will see when it answers, and every token of the
answer counts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.data import turns
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import Rendered, Template
from jaxtune.errors import UserError

Spans = list[tuple[int, int]]

_WORD = 'Zq7vAnswerK3x'  # an answer that no conversation holds; no template takes letters and digits away
_MOST_SHAPES = 4096


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: `ids` int32 `[tokens]`, and `assistant_mask` bool `[tokens]`."""

    ids: np.ndarray
    assistant_mask: np.ndarray


class Encoder:
    """Encodes conversations with a template.

    Args:
      template: makes the text.
      tokenizer: makes the tokens.
      last: only the last answer is trained, else every one.
      skip: this many turns at the start (demonstrations) are never trained.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase, last: bool = False, skip: int = 0
    ) -> None:
        self.template, self.tokenizer, self.last, self.skip = template, tokenizer, last, skip
        added = getattr(tokenizer, 'added_tokens_decoder', {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = tuple(sorted(filter(None, special)))
        self.added = tuple(sorted({str(token) for token in added if str(token).strip()}))
        self._tails: dict[tuple, Tail | None] = {}

    def __call__(self, chat: Chat) -> Encoded:
        """The tokens of a conversation; turns after the last answer are left out.

        Raises:
          FormatError: the template refuses the conversation, or rewrites earlier turns.
          UserError: the template cannot be trained with.
        """
        result = next(self.many([chat]))
        if isinstance(result, Exception):
            raise result
        return result

    def many(self, chats: Sequence[Chat]) -> Iterator[Encoded | FormatError | UserError]:
        """The tokens of several conversations, rendered at once; the error of `__call__` in the place of its own."""
        asked = [self._asked(chat) for chat in chats]
        rendered = self.template.try_all([one for _, some in asked for one in some])
        if len(chats) > 1 and any(isinstance(one, UserError) for one in rendered):
            for chat in chats:  # which of them it was
                yield from self.many([chat])
            return
        renderings = iter(rendered)
        for answers, some in asked:
            try:
                yield self._encode(*self._text(answers, some, list(itertools.islice(renderings, len(some)))))
            except (FormatError, UserError) as error:
                yield error

    def _encode(self, text: str, spans: Spans) -> Encoded:
        ids, covers = tokenise(self.tokenizer, text, [edge for span in spans for edge in span])
        assistant_mask = np.zeros(len(ids), bool)
        for start, end in spans:
            assistant_mask |= (covers[:, 0] >= start) & (covers[:, 1] <= end) & (covers[:, 1] > covers[:, 0])
        return Encoded(np.asarray(ids, np.int32), assistant_mask)

    def prompt(self, chat: Chat) -> tuple[str, list[int]]:
        """Text and ids of a conversation up to where the assistant writes.

        Raises:
          FormatError: the template refuses the conversation, or leaves a tool call out.
          UserError: the template fails.
        """
        text = self.template.render(chat, True)
        turns.check(self.template, [turns.Rendered(chat, True, text)])
        return text, tokenise(self.tokenizer, text, ())[0]

    def text(self, chat: Chat) -> tuple[str, Spans]:
        """The text and its trained spans, in characters."""
        answers, asked = self._asked(chat)
        return self._text(answers, asked, self.template.try_all(asked))

    def _asked(self, chat: Chat) -> tuple[list[int], list[tuple[Chat, bool]]]:
        """The turns that are trained, and what is to be rendered to find their spans."""
        answers = [i for i, turn in enumerate(chat.turns) if turn['role'] == 'assistant' and i >= self.skip]
        chat = chat.before(answers[-1] + 1)
        if self.template.marks:
            first = answers[-1] if self.last else answers[0] if self.skip else 0
            return answers, [(chat, False), *([(chat.before(first), False)] if first else [])]
        answers = answers[-1:] if self.last else answers
        return answers, [(chat.before(number + after), not after) for number in answers for after in (0, 1)]

    def _text(self, answers: list[int], asked: list[tuple[Chat, bool]], rendered: list) -> tuple[str, Spans]:
        for one in rendered:
            if isinstance(one, Exception):
                raise one
        if self.template.marks:
            return self._marked(asked[0][0], answers, *rendered)
        chat, texts = asked[-1][0], [text for text, _ in rendered]
        firsts = [0, *(number + 1 for number in answers)]
        turns.check(
            self.template, [turns.Rendered(*asked[i], texts[i], firsts[i // 2]) for i in range(1, len(asked), 2)]
        )
        spans, text, ended = [], '', False
        for number, before, after in zip(answers, texts[::2], texts[1::2], strict=True):
            self._check_extends(text, before, number)
            self._check_extends(before, after, number)
            tail = self._tail(chat, number)
            self._check_written(chat.turns[number]['content'], after[len(before) :], number, tail)
            end, ended = self._end(tail, before, after)
            spans.append((len(before), end))
            text = after[:end]
        return self._finish(text, spans, ended)

    def _marked(self, chat: Chat, answers: list[int], whole: Rendered, *earlier: Rendered) -> tuple[str, Spans]:
        """The spans that the template marks, an answer may have several; and the end of each turn, marked or not.

        Those of the `earlier` part, which is not trained, are left out.
        """
        text, spans = whole
        turns.check(self.template, [turns.Rendered(chat, False, text)])
        count = sum(turn['role'] == 'assistant' for turn in chat.turns)
        if len(spans) < count:
            raise FormatError(
                'marks', f'{self.template.name} template marks {len(spans)} of {count} answers with {{% generation %}}'
            )
        tail = self._tail(chat, answers[-1])
        self._check_written(chat.turns[-1]['content'], text, answers[-1], tail)
        end = tail.end if tail else ''
        if end:
            spans = [(low, high + len(end) * text.startswith(end, high)) for low, high in spans]
        spans = [span for span in spans[len(earlier[0][1]) if earlier else 0 :] if span[0] < span[1]]
        if not spans:
            raise FormatError('marks', f'{self.template.name} template marks nothing of the answers that are trained')
        return self._finish(text[: spans[-1][1]], spans, bool(end) or self._ends(text[: spans[-1][1]]))

    def _check_extends(self, before: str, text: str, number: int) -> None:
        if not text.startswith(before):
            same = next((i for i, pair in enumerate(zip(text, before, strict=False)) if pair[0] != pair[1]), len(text))
            raise UserError(
                f'data.template: {self.template.name} template rewrites earlier text when it comes to turn '
                f'{number + 1} (after {before[max(0, same - 20) : same]!r}), so what the assistant wrote cannot be '
                "told apart; expected one that marks it with {% generation %}, or sft.train_on='last'"
            )

    def _check_written(self, content: str, written: str, number: int, tail: 'Tail | None') -> None:
        """Refuses a template that leaves out some of an answer; blanks may change."""
        own = written.removesuffix(tail.text) if tail else written
        there = content.strip() in own or ''.join(content.split()) in ''.join(own.split())
        if content.strip() and not (there and (tail is None or tail.written)):
            raise UserError(
                f'data.template: {self.template.name} template does not write the answer of turn {number + 1}, '
                f'{content.strip()!r:.40}, but {written!r:.40}; expected one that writes all of it'
            )

    def _end(self, tail: 'Tail | None', before: str, after: str) -> tuple[int, bool]:
        """Where a turn ends: with the special tokens after its answer; what follows them is nobody's.

        That may be a line break, or the EOS that some templates put after the last turn only.

        Returns:
          `(end, ended)`: a place in `after`, and whether a special token stands before it.
        """
        if (
            tail is not None
            and tail.written
            and after.endswith(tail.text)
            and len(after) - len(tail.text) >= len(before)
        ):
            end = len(after) - len(tail.text) + len(tail.end or tail.text)
            return end, bool(tail.end)
        # A turn that ends otherwise than a text does, as calls of tools may.
        stripped = after.rstrip()
        return (len(stripped), True) if self._ends(stripped) else (len(after), False)

    def _ends(self, text: str) -> bool:
        return text.rstrip().endswith(self.special)

    def _tail(self, chat: Chat, number: int) -> 'Tail | None':
        """What the template writes after an answer that is a text; None where it refuses one.

        Raises:
          UserError: it has no generation prompt, so that the model would learn to write the template's own header.
        """
        asked = chat.before(number)
        shape = (asked.tools is None, *((turn['role'], *turn) for turn in asked.turns))
        if shape not in self._tails:
            if len(self._tails) > _MOST_SHAPES:
                self._tails.clear()
            self._tails[shape] = self._find_tail(asked)
        return self._tails[shape]

    def _find_tail(self, asked: Chat) -> 'Tail | None':
        answered = dataclasses.replace(asked, turns=(*asked.turns, {'role': 'assistant', 'content': _WORD}))
        prompted, bare, full = self.template.try_all([(asked, True), (asked, False), (answered, False)])
        if isinstance(full, Exception):
            return None
        if _WORD not in full[0]:
            return Tail('', '', written=False)
        head, _, text = full[0].rpartition(_WORD)
        if not self.template.marks and prompted == bare and not isinstance(bare, Exception):
            head = head.removeprefix(bare[0]).partition(_WORD)[0]
            if head.strip():
                raise UserError(
                    f'data.template: {self.template.name} template has no generation prompt: it writes {head!r:.40} '
                    'before an answer, but not when asked for one; expected {% if add_generation_prompt %}'
                )
        # A token that ends turns may have been added without being special.
        return Tail(text, _first_run(text, self.special) or _first_run(text, self.added))

    def _finish(self, text: str, spans: Spans, ended: bool) -> tuple[str, Spans]:
        """The text up to its last trained character; where no token ends the last answer, EOS does."""
        start, _ = spans[-1]
        eos: Any = self.tokenizer.eos_token
        if eos and not ended:
            text += eos
            spans = [*spans[:-1], (start, len(text))]
        return text, spans

    def end_token(self) -> str | None:
        """The token that ends an answer; None where the template does not write one."""
        tail = self._tail(Chat(({'role': 'user', 'content': 'a'},)), 1)
        if tail is None:
            return None
        ends = (token for token in (*self.special, *self.added) if tail.end.endswith(token))
        eos: Any = self.tokenizer.eos_token
        return max(ends, key=len, default=eos)


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a template writes after an answer.

    Attributes:
      text: all of it.
      end: its beginning up to the tokens that end the turn; '' where there are none.
      written: whether the answer itself is.
    """

    text: str
    end: str
    written: bool = True


def _first_run(text: str, tokens: tuple[str, ...]) -> str:
    """The beginning of a text up to the end of the first tokens in it that follow each other; '' where it has none."""
    end = min((where for token in tokens if (where := text.find(token)) >= 0), default=None)
    if end is None:
        return ''
    while token := max((token for token in tokens if text.startswith(token, end)), key=len, default=''):
        end += len(token)
    return text[:end]


def end_of_turn(template: Template, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer; None if it is not one token."""
    try:
        token = Encoder(template, tokenizer).end_token()
    except UserError:
        return None  # a template that cannot be trained with may still be written with
    token_id: Any = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return token_id


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Ids of a text, no token of which lies across an edge, and the characters `[tokens, 2]` that each covers."""
    edges = sorted({edge for edge in edges if 0 < edge < len(text)})
    if not tokenizer.is_fast:
        return _pieces(tokenizer, text, edges)
    ids, covers = _encode(tokenizer, text)
    crossed = [edge for edge in edges if ((covers[:, 0] < edge) & (covers[:, 1] > edge)).any()]
    return _pieces(tokenizer, text, crossed) if crossed else (ids, covers)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], np.ndarray]:
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids, np.tile([[0, len(text)]], (len(ids), 1))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded.offset_mapping, np.int64).reshape(-1, 2)
    # Some tokenizers leave a token's leading space out of its offsets; what no other token covers is its own.
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    before = np.concatenate([[0], ends[:-1]]) if len(offsets) else ends
    starts = np.minimum(offsets[:, 0], before)
    return encoded.input_ids, np.stack([starts, offsets[:, 1]], axis=1)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Each piece between edges by itself, as it would be tokenised after other text."""
    bounds = [0, *edges, len(text)]
    ids: list[int] = []
    covers = []
    for low, high in itertools.pairwise(bounds):
        piece = text[low:high]
        if not piece:
            continue
        new, cover = _encode(tokenizer, piece)
        anchor = _anchor(tokenizer) if low else ''
        if anchor:
            head = len(_encode(tokenizer, anchor)[0])
            joined, joined_cover = _encode(tokenizer, anchor + piece)
            if joined[:head] == _encode(tokenizer, anchor)[0] and (joined_cover[head:, 0] >= len(anchor)).all():
                new, cover = joined[head:], joined_cover[head:] - len(anchor)
        ids += new
        covers.append(cover + low)
    return ids, np.concatenate(covers) if covers else np.zeros((0, 2), np.int64)


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to put before a piece where the tokenizer would begin it with a space of its own; '' where not."""
    first: Any = tokenizer.convert_ids_to_tokens(tokenizer('a', add_special_tokens=False).input_ids[0])
    return '\n' if first.startswith(('▁', 'Ġ')) else ''
