"""For each answer of a conversation, the prompt that a served model reads and the completion that it writes.

The prompt is what the template renders with a generation prompt, on the conversation so far; the completion is what the
template then shows of the answer, up to the tokens that end its turn. Where the turn ends is not known from the letters
of an answer: a sentinel is rendered in its place, and what the template writes around it is read off. What a template
writes by itself is not learnt: the header of a turn, or an empty block of thinking.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from jaxtune.data import thinking, turns
from jaxtune.data.formats import REASONING, Chat, FormatError
from jaxtune.data.templates import Rendered, Template
from jaxtune.errors import UserError

Spans = list[tuple[int, int]]

_SENTINEL = 'Zq7vAnswerK3x'  # no conversation holds it, and no template strips letters and digits
_CACHE_LIMIT = 4096
_PLAIN = Chat(({'role': 'user', 'content': 'a'},))


class Answer(NamedTuple):
    """One answer as it is served.

    Attributes:
      turn: its number in the conversation.
      prompt: what the model reads.
      completion: what it writes, with what ends its turn.
      spans: what of the completion is trained, in characters.
      ended: whether a special token ends it.
    """

    turn: int
    prompt: str
    completion: str
    spans: Spans
    ended: bool


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a template writes around an answer that is a text.

    Attributes:
      head: what it writes between what the model reads and the answer.
      text: all that comes after the answer.
      end: its beginning up to the tokens that end the turn; '' where there are none.
      written: whether the answer itself is.
    """

    head: str
    text: str
    end: str
    written: bool = True


class AnswerReader:
    """Finds answers as they are served with a template.

    Args:
      template: makes the text.
      tokenizer: whose special tokens may end a turn.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer
        added = getattr(tokenizer, 'added_tokens_decoder', {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = tuple(sorted(filter(None, special)))
        self.added = tuple(sorted({str(token) for token in added if str(token).strip()}))
        self._tails: dict[tuple, Tail | None] = {}

    def answers(self, chats: Sequence[tuple[Chat, Sequence[int]]]) -> Iterator[list[Answer] | FormatError | UserError]:
        """The answers of conversations at the turns that are asked for, rendered at once.

        Yields:
          Those of each conversation, or what is wrong with it, which names the turn.
        """
        asked = [request for chat, wanted in chats for number in wanted for request in _requests(chat, number)]
        rendered = self.template.try_all(asked)
        if len(chats) > 1 and any(isinstance(one, UserError) for one in rendered):
            for asked_for in chats:  # which of them it was
                yield from self.answers([asked_for])
            return
        results = iter(rendered)
        for chat, wanted in chats:
            texts = list(itertools.islice(results, 2 * len(wanted)))
            try:
                pairs = zip(wanted, texts[::2], texts[1::2], strict=True)
                yield [self._answer(chat, number, prompt, whole) for number, prompt, whole in pairs]
            except (FormatError, UserError) as error:
                yield error

    def _answer(
        self, chat: Chat, number: int, prompted: Rendered | Exception, answered: Rendered | Exception
    ) -> Answer:
        for result in (prompted, answered):
            if isinstance(result, FormatError):
                raise FormatError(result.kind, f'turn {number + 1}: {result}')
            if isinstance(result, Exception):
                raise result
        assert not isinstance(prompted, Exception)
        assert not isinstance(answered, Exception)
        prompt, (whole, marks) = prompted[0], answered
        turn, tail = chat.turns[number], self._tail(chat, number)
        start, opens = (len(prompt), False) if whole.startswith(prompt) else self._start(chat, number, prompt, whole)
        end, ended = self._end(tail, start, whole)
        completion, composed = self._with_reasoning(turn, number, prompt, whole[start:end], tail, opens)
        before = [i for i in range(number) if chat.turns[i]['role'] == 'assistant']
        first = before[-1] + 1 if before else 0
        turns.check(self.template, [turns.Rendered(chat.before(number + 1), False, whole, first, not opens)])
        self._check_written(thinking.split(turn['content'])[1], completion, number, tail)
        answer = Answer(number, prompt, completion, [(0, len(completion))], ended)
        if self.template.marks and not composed:
            return self._marked(answer, whole, (start, end), tail, marks)
        return answer

    def _with_reasoning(
        self, turn: dict[str, Any], number: int, prompt: str, shown: str, tail: Tail | None, opens: bool
    ) -> tuple[str, bool]:
        """The completion as the model writes it, where the template shows an answer's thinking otherwise.

        Args:
          turn: the assistant's.
          number: its place in the conversation.
          prompt: what the model reads.
          shown: what the template shows of the answer.
          tail: what it writes around one.
          opens: the prompt ends with a block of thinking that the template does not show.

        Returns:
          `(completion, composed)`: whether it is put together here.

        Raises:
          FormatError: the prompt opens a block of thinking, and the turn has no thought.
        """
        block, (thought, _) = thinking.opened(prompt), thinking.split(turn['content'])
        reasoning = turn.get(REASONING) or thought
        if block and (opens or shown.lstrip().startswith(block[1])):
            if not reasoning:
                raise FormatError(
                    'no reasoning',
                    f'turn {number + 1} holds no reasoning, and {self.template.name} template asks for some '
                    f'({block[0]}); expected {REASONING!r} in the turn, or data.template_args or a data.template with '
                    'which the model is asked without',
                )
            return (f'{reasoning.strip()}\n{block[1]}\n\n{shown}' if opens else shown), opens
        if thought and thought not in shown and tail is not None and not turn.get('tool_calls'):
            # The template drops the thought; at inference the model writes it all the same.
            return f'{tail.head}{turn["content"].strip()}{tail.end}', True
        if reasoning or self.template.marks or thinking.empty_block(turn['content']):
            return shown, False
        return shown[thinking.empty_block(shown) :], False

    def _start(self, chat: Chat, number: int, prompt: str, whole: str) -> tuple[int, bool]:
        """Where an answer begins in a text that does not begin with what the model reads when asked for it.

        Returns:
          `(place, opens)`: whether the prompt goes on with a block of thinking that the text leaves out.

        Raises:
          UserError: it cannot be told.
        """
        shown = self.template.try_all([(_answered(chat.before(number)), False)])[0]
        if not isinstance(shown, Exception) and _SENTINEL in shown[0]:
            head = shown[0].rpartition(_SENTINEL)[0]
            if whole.startswith(head) and prompt.startswith(head) and thinking.opened(prompt[len(head) :]):
                return len(head), True
            plain = self._tail(_PLAIN, 1)
            if plain is not None and head.endswith(plain.head):
                head = head[: len(head) - len(plain.head)]
                if whole.startswith(head):
                    return len(head), False
        raise UserError(
            f'data.template: {self.template.name} template shows turn {number + 1} after another text than the model '
            f'reads when it is asked for it (which ends with {prompt[-40:]!r}), so what it writes cannot be told; '
            'expected a record without what differs (such as reasoning where data.template_args close it), or a '
            'template that shows both alike'
        )

    def _marked(self, answer: Answer, whole: str, place: tuple[int, int], tail: Tail | None, marks: Spans) -> Answer:
        """An answer of a template that marks what is trained.

        A mark that takes in what the model reads means the turn, of which what the model writes is trained. Another is
        taken as it stands, also where it goes on after the end of the turn; one that stops before it goes on to it.
        """
        start, end = place
        own = [(low, high) for low, high in marks if high > start]
        if not own:
            raise FormatError('marks', f'{self.template.name} template marks nothing of turn {answer.turn + 1}')
        if own[0][0] < start:
            own = [(max(low, start), min(high, end)) for low, high in own]
        low, high = own[-1]
        if tail is not None and tail.end and whole[high:end] == tail.end:
            own[-1] = (low, end)
        spans = [(low - start, high - start) for low, high in own if low < high]
        return answer._replace(completion=whole[start : max(end, own[-1][1])], spans=spans)

    def _check_written(self, answer: str, written: str, number: int, tail: Tail | None) -> None:
        """Refuses a template that leaves out some of an answer; whitespace may change."""
        there = answer.strip() in written or ''.join(answer.split()) in ''.join(written.split())
        if answer.strip() and not (there and (tail is None or tail.written)):
            raise UserError(
                f'data.template: {self.template.name} template does not write the answer of turn {number + 1}, '
                f'{answer.strip()!r:.40}, but {written!r:.40}; expected one that writes all of it'
            )

    def _end(self, tail: Tail | None, start: int, whole: str) -> tuple[int, bool]:
        """Where a turn ends: with the special tokens after its answer; what follows them is not trained.

        That may be a line break, or the EOS that some templates put after the last turn only.

        Returns:
          `(end, ended)`: a place in `whole`, and whether a special token stands before it.
        """
        if tail is not None and tail.written and whole.endswith(tail.text) and len(whole) - len(tail.text) >= start:
            return len(whole) - len(tail.text) + len(tail.end or tail.text), bool(tail.end)
        # A turn that ends otherwise than a text does, as tool calls may.
        stripped = whole.rstrip()
        return (len(stripped), True) if stripped.endswith(self.special) else (len(whole), False)

    def _tail(self, chat: Chat, number: int) -> Tail | None:
        """What the template writes around an answer that is a text; None where it refuses one.

        Raises:
          UserError: it has no generation prompt, so that the model would learn to write the template's own header.
        """
        asked = chat.before(number)
        shape = (asked.tools is None, *((turn['role'], *turn) for turn in asked.turns))
        if shape not in self._tails:
            if len(self._tails) > _CACHE_LIMIT:
                self._tails.clear()
            self._tails[shape] = self._find_tail(asked)
        return self._tails[shape]

    def _find_tail(self, asked: Chat) -> Tail | None:
        prompted, bare, shown = self.template.try_all([(asked, True), (asked, False), (_answered(asked), False)])
        if isinstance(shown, Exception):
            return None
        if _SENTINEL not in shown[0]:
            return Tail('', '', '', written=False)
        before, _, text = shown[0].rpartition(_SENTINEL)
        asks = self.template.marks or prompted != bare
        if not asks and not isinstance(bare, Exception) and before.startswith(bare[0]):
            head = before[len(bare[0]) :].partition(_SENTINEL)[0]
            if head.strip():
                raise UserError(
                    f'data.template: {self.template.name} template has no generation prompt: it writes {head!r:.40} '
                    'before an answer, but not when asked for one; expected {% if add_generation_prompt %}'
                )
        head = ''
        if not isinstance(prompted, Exception) and before.startswith(prompted[0]):
            head = before[len(prompted[0]) :]
        # A token that ends turns may have been added without being special.
        return Tail(head, text, _first_run(text, self.special) or _first_run(text, self.added))

    def end_token(self) -> str | None:
        """The token that ends an answer; None where the template does not write one."""
        tail = self._tail(_PLAIN, 1)
        if tail is None:
            return None
        ends = (token for token in (*self.special, *self.added) if tail.end.endswith(token))
        eos: Any = self.tokenizer.eos_token
        return max(ends, key=len, default=eos)


def _requests(chat: Chat, number: int) -> tuple[tuple[Chat, bool], tuple[Chat, bool]]:
    return (chat.before(number), True), (chat.before(number + 1), False)


def _answered(asked: Chat) -> Chat:
    """A conversation with a word as the answer."""
    return dataclasses.replace(asked, turns=(*asked.turns, {'role': 'assistant', 'content': _SENTINEL}))


def _first_run(text: str, tokens: tuple[str, ...]) -> str:
    """The beginning of a text up to the end of the first tokens in it that follow each other; '' where it has none."""
    end = min((where for token in tokens if (where := text.find(token)) >= 0), default=None)
    if end is None:
        return ''
    while token := max((token for token in tokens if text.startswith(token, end)), key=len, default=''):
        end += len(token)
    return text[:end]
