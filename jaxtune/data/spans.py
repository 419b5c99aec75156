"""Which tokens of a conversation are trained: what the assistant wrote, with the token that ends its turn.

Few templates mark it (`{% generation %}`). Where one does not, the spans are found by rendering the conversation up to
before and after each answer: each text must begin with the one before it, else the template rewrites earlier turns and
no span can be trusted. Spans of characters become spans of tokens by the tokenizer's offsets; where a token would lie
across an edge, the text is cut there and both sides are tokenised by themselves: then the prompt's tokens are those
that the model will see when it answers, and every token of the answer counts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import Template
from jaxtune.errors import UserError

Spans = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: `ids` int32 `[tokens]`, and `trained` bool `[tokens]`."""

    ids: np.ndarray
    trained: np.ndarray


class Encoder:
    """Encodes conversations with a template.

    Args:
      template: makes the text.
      tokenizer: makes the tokens.
      last: only the last answer is trained, else every one.
      skip: this many turns at the start (demonstrations) are never trained.
    """

    def __init__(self, template: Template, tokenizer, last: bool = False, skip: int = 0):
        self.template, self.tokenizer, self.last, self.skip = template, tokenizer, last, skip
        added = getattr(tokenizer, 'added_tokens_decoder', {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = tuple(sorted(filter(None, special)))

    def __call__(self, chat: Chat) -> Encoded:
        """The tokens of a conversation; turns after the last answer are left out.

        Raises:
          FormatError: the template refuses the conversation, or rewrites earlier turns.
          UserError: the template cannot be trained with.
        """
        text, spans = self.text(chat)
        ids, covers = tokenise(self.tokenizer, text, [edge for span in spans for edge in span])
        trained = np.zeros(len(ids), bool)
        for start, end in spans:
            trained |= (covers[:, 0] >= start) & (covers[:, 1] <= end) & (covers[:, 1] > covers[:, 0])
        return Encoded(np.asarray(ids, np.int32), trained)

    def prompt(self, chat: Chat) -> tuple[str, list[int]]:
        """Text and ids of a conversation up to where the assistant writes."""
        text = self.template.render(chat, True)
        return text, tokenise(self.tokenizer, text, ())[0]

    def text(self, chat: Chat) -> tuple[str, Spans]:
        """The text and its trained spans, in characters."""
        answers = [i for i, turn in enumerate(chat.turns) if turn['role'] == 'assistant' and i >= self.skip]
        chat = chat.before(answers[-1] + 1)
        if self.template.marks:
            return self._finish(*self._marked(chat, answers))
        spans, text = [], ''
        for number in answers[-1:] if self.last else answers:
            before = self._extend(chat.before(number), True, text, number)
            after = self._extend(chat.before(number + 1), False, before, number)
            self._check_prompt(chat, number, before, after)
            end = self._end(after, len(before), chat.turns[number]['content'])
            spans.append((len(before), end))
            text = after[:end]
        return self._finish(text, spans)

    def _marked(self, chat: Chat, answers: list[int]) -> tuple[str, Spans]:
        """The spans that the template marks, as it marks them: an answer may have several."""
        text, spans = self.template.render_marked(chat)
        spans = [span for span in spans if span[0] < span[1]]
        count = sum(turn['role'] == 'assistant' for turn in chat.turns)
        if len(spans) < count:
            raise FormatError(
                'marks', f'{self.template.name} template marks {len(spans)} of {count} answers with {{% generation %}}'
            )
        first = 0  # what ends before it is not trained
        if self.last:
            first = text.rfind(chat.turns[-1]['content'].strip())
        elif self.skip:
            for turn in chat.turns[: answers[0] + 1]:
                first = max(first, text.find(turn['content'].strip(), first))
        spans = [span for span in spans if span[1] > first]
        return text, spans

    def _extend(self, chat: Chat, generation_prompt: bool, before: str, number: int) -> str:
        text = self.template.render(chat, generation_prompt)
        if not text.startswith(before):
            same = next((i for i, pair in enumerate(zip(text, before, strict=False)) if pair[0] != pair[1]), len(text))
            raise UserError(
                f'data.template: {self.template.name} template rewrites earlier text when it comes to turn '
                f'{number + 1} (after {before[max(0, same - 20) : same]!r}), so what the assistant wrote cannot be '
                "told apart; expected one that marks it with {% generation %}, or sft.train_on='last'"
            )
        return text

    def _check_prompt(self, chat: Chat, number: int, before: str, after: str) -> None:
        """Refuses a template that leaves an answer out, or whose own header the model would learn to write."""
        content, written = chat.turns[number]['content'].strip(), after[len(before) :]
        if content[-12:] not in written:
            raise UserError(
                f'data.template: {self.template.name} template does not write the answer of turn {number + 1}, '
                f'{content!r:.40}, but {written!r:.40}; expected one for turns of text'
            )
        if (
            content
            and not written.lstrip().startswith(content[:20])
            and self.template.render(chat.before(number)) == before
        ):
            raise UserError(
                f'data.template: {self.template.name} template has no generation prompt: it writes '
                f'{written.split(content[:20])[0]!r:.40} before an answer, but not when asked for one; expected '
                '{% if add_generation_prompt %}'
            )

    def _end(self, text: str, start: int, content: str) -> int:
        """Where a turn ends: with the special tokens after its content; what follows them is nobody's.

        That may be a line break, or the EOS that some templates put after the last turn only.
        """
        at = text.rfind(content.strip(), start) + len(content.strip())
        found = [(where, token) for token in self.special if (where := text.find(token, max(at, start))) >= 0]
        if not found:
            return len(text)
        end = min(where for where, _ in found)
        while token := next((token for token in self.special if text.startswith(token, end)), ''):
            end += len(token)
        return end

    def _finish(self, text: str, spans: Spans) -> tuple[str, Spans]:
        """The text up to its last trained character; where no token ends the last answer, EOS does."""
        start, end = spans[-1]
        text = text[:end]
        eos = self.tokenizer.eos_token
        if eos and not any(token in text[start:] for token in self.special):
            text += eos
            spans = [*spans[:-1], (start, len(text))]
        return text, spans


def end_of_turn(template: Template, tokenizer) -> int | None:
    """The token that ends an answer; None if it is not one token."""
    example = Chat(({'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}))
    encoder = Encoder(template, tokenizer)
    try:
        text, spans = encoder.text(example)
    except (FormatError, UserError):
        return None  # a template that cannot be trained with may still be written with
    text = text[: spans[-1][1]].rstrip()
    ended = next((token for token in encoder.special if text.endswith(token)), None)
    return None if ended is None else tokenizer.convert_tokens_to_ids(ended)


def tokenise(tokenizer, text: str, edges: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Ids of a text, no token of which lies across an edge, and the characters `[tokens, 2]` that each covers."""
    edges = sorted({edge for edge in edges if 0 < edge < len(text)})
    if not tokenizer.is_fast:
        return _pieces(tokenizer, text, edges)
    ids, covers = _encode(tokenizer, text)
    crossed = [edge for edge in edges if ((covers[:, 0] < edge) & (covers[:, 1] > edge)).any()]
    return _pieces(tokenizer, text, crossed) if crossed else (ids, covers)


def _encode(tokenizer, text: str) -> tuple[list[int], np.ndarray]:
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


def _pieces(tokenizer, text: str, edges: Sequence[int]) -> tuple[list[int], np.ndarray]:
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
def _anchor(tokenizer) -> str:
    """What to put before a piece where the tokenizer would begin it with a space of its own; '' where not."""
    first = tokenizer.convert_ids_to_tokens(tokenizer('a', add_special_tokens=False).input_ids[0])
    return '\n' if first.startswith(('▁', 'Ġ')) else ''
