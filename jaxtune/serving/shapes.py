"""Answers as OpenAI's API shows them: of conversations and completions, whole and in pieces."""

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxtune.generation.engine import Piece
from jaxtune.serving.answers import Answers, Part
from jaxtune.serving.protocol import Wanted
from jaxtune.serving.text import Names, Token, Writer

Prompts = Sequence[tuple[int, ...]]


def usage(answers: Answers) -> dict[str, int]:
    """Tokens of all prompts, each once, and of all answers, the ones that end them included."""
    read, written = answers.prompt_tokens, answers.written
    return {'prompt_tokens': read, 'completion_tokens': written, 'total_tokens': read + written}


class Shape:
    """One kind of answer.

    Args:
      names: what tokens are called.
      wanted: the request.
      number: the answer's own id.
    """

    whole_kind = piece_kind = ''

    def __init__(self, names: Names, wanted: Wanted, number: str) -> None:
        self.names, self.wanted, self.id, self.created = names, wanted, number, int(time.time())

    def frame(self, choices: list[dict[str, Any]], whole: bool = False) -> dict[str, Any]:
        """An object with these choices."""
        kind = self.whole_kind if whole else self.piece_kind
        made = {'id': self.id, 'object': kind, 'created': self.created, 'model': self.wanted.model, 'choices': choices}
        return made | ({'usage': None} if self.wanted.usage and not whole else {})

    async def whole(self, answers: Answers, prompts: Prompts) -> dict[str, Any]:
        """The whole answer."""
        count = len(prompts) * self.wanted.n
        texts, tokens, ends = [''] * count, [[] for _ in range(count)], [''] * count
        async for part in answers.parts():
            texts[part.choice] += part.text
            tokens[part.choice] += part.tokens
            ends[part.choice] = part.finish or ''
        choices = []
        for number in range(count):
            part = Part(number, texts[number], tokens[number], ends[number])
            choices.append(self.choice(self._after(part, self._prompt(number, prompts), answers)))
        return self.frame(choices, whole=True) | {'usage': usage(answers)}

    async def pieces(self, answers: Answers, prompts: Prompts) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces."""
        begun = set()
        async for part in answers.parts():
            if part.choice not in begun:
                begun.add(part.choice)
                if opening := self.opening(part.choice):
                    yield self.frame([opening])
                part = self._after(part, self._prompt(part.choice, prompts), answers)
            else:
                part = self._later(part)
            for piece in self.piece(part):
                yield self.frame([piece])

    def _prompt(self, choice: int, prompts: Prompts) -> tuple[int, ...]:
        return prompts[choice // self.wanted.n]

    def _after(self, part: Part, prompt: tuple[int, ...], answers: Answers) -> Part:
        """The first part of an answer with what stands before it."""
        return part

    def _later(self, part: Part) -> Part:
        """A later part, in the places that it has in the whole."""
        return part

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What comes before the first piece of an answer."""
        return None

    def choice(self, part: Part) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def piece(self, part: Part) -> list[dict[str, Any]]:
        """A part of one."""
        raise NotImplementedError


class Chat(Shape):
    """An answer in a conversation."""

    whole_kind, piece_kind = 'chat.completion', 'chat.completion.chunk'

    def choice(self, part: Part) -> dict[str, Any]:
        """A whole answer."""
        message = {'role': 'assistant', 'content': part.text, 'refusal': None}
        made = {'index': part.choice, 'message': message, 'logprobs': self._logprobs(part)}
        return made | {'finish_reason': part.finish}

    def opening(self, choice: int) -> dict[str, Any]:
        """Who speaks."""
        delta = {'role': 'assistant', 'content': ''}
        return {'index': choice, 'delta': delta, 'logprobs': None, 'finish_reason': None}

    def piece(self, part: Part) -> list[dict[str, Any]]:
        """A part of one, and its end apart."""
        made = {'index': part.choice, 'delta': {'content': part.text}, 'logprobs': self._logprobs(part)}
        pieces = [made | {'finish_reason': None}] if part.text or part.tokens else []
        if part.finish:
            pieces.append({'index': part.choice, 'delta': {}, 'logprobs': None, 'finish_reason': part.finish})
        return pieces

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if self.wanted.alternatives is None:
            return None
        content = []
        for token in part.tokens:
            others = token.alternatives[: self.wanted.alternatives]
            content.append(
                self._named(token.id, token.logprob) | {'top_logprobs': [self._named(*one) for one in others]}
            )
        return {'content': content, 'refusal': None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        name, data = self.names(token)
        return {'token': name, 'logprob': logprob, 'bytes': data}


class Completion(Shape):
    """An answer that goes on from its prompt.

    Args:
      names: what tokens are called.
      wanted: the request.
      number: the answer's own id.
      tokenizer: that of the model.
    """

    whole_kind = piece_kind = 'text_completion'

    def __init__(self, names: Names, wanted: Wanted, number: str, tokenizer: Any) -> None:
        super().__init__(names, wanted, number)
        self._tokenizer, self._shifts = tokenizer, {}

    def choice(self, part: Part) -> dict[str, Any]:
        """A whole answer."""
        made = {'index': part.choice, 'text': part.text, 'logprobs': self._logprobs(part)}
        return made | {'finish_reason': part.finish}

    def piece(self, part: Part) -> list[dict[str, Any]]:
        """A part of one."""
        return [self.choice(part)]

    def _after(self, part: Part, prompt: tuple[int, ...], answers: Answers) -> Part:
        if not self.wanted.echo:
            return part
        scores = answers.scores.get(part.choice // self.wanted.n * self.wanted.n, Piece([], [], []))
        logprobs = [None, *scores.logprobs] if scores.logprobs else [None] * len(prompt)
        others = [[], *scores.alternatives] if scores.alternatives else [[]] * len(prompt)
        writer = Writer(self._tokenizer, ())
        for token, logprob, likeliest in zip(prompt, logprobs, others, strict=True):
            writer.write(token, logprob, likeliest)
        writer.end()
        text, before = writer.take(ended=True)
        self._shifts[part.choice] = len(text)
        part = self._later(part)
        return part._replace(text=text + part.text, tokens=before + part.tokens)

    def _later(self, part: Part) -> Part:
        shift = self._shifts.get(part.choice, 0)
        return part._replace(tokens=[dataclasses.replace(one, start=one.start + shift) for one in part.tokens])

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if self.wanted.alternatives is None:
            return None
        return {
            'tokens': [self.names(token.id)[0] for token in part.tokens],
            'token_logprobs': [token.logprob for token in part.tokens],
            'top_logprobs': [self._others(token) for token in part.tokens] if self.wanted.alternatives else None,
            'text_offset': [token.start for token in part.tokens],
        }

    def _others(self, token: Token) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        others = {}
        for other, logprob in token.alternatives[: self.wanted.alternatives]:
            others.setdefault(self.names(other)[0], logprob)
        return {**others, self.names(token.id)[0]: token.logprob} if others else None
