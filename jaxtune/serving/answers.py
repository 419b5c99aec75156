"""The answers to one request, as they are written: pieces of text of each, and how each ended."""

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from jaxtune.generation.engine import Ask, End, Engine, Full, Piece, Ticket
from jaxtune.serving.protocol import MOST_ALTERNATIVES, ApiError, Wanted
from jaxtune.serving.text import Token, Writer


class Part(NamedTuple):
    """What was written of an answer since its last part.

    Attributes:
      choice: the answer's number; those to one prompt follow each other.
      text: what follows the text before.
      tokens: those that made it.
      finish: `stop` or `length` with the last part, else None.
    """

    choice: int
    text: str
    tokens: list[Token]
    finish: str | None = None


class Answers:
    """Answers that are being written.

    Args:
      engine: writes them.
      tokenizer: that of the model.
      stop_ids: tokens that end an answer, and are no part of its text.
      wanted: the request.
      prompts: token ids of each prompt.
      limits: tokens that an answer to each may have.

    Raises:
      ApiError: too many requests wait.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        stop_ids: Sequence[int],
        wanted: Wanted,
        prompts: Sequence[tuple[int, ...]],
        limits: Sequence[int],
    ) -> None:
        self.prompt_tokens, self.written = sum(map(len, prompts)), 0
        self._events: asyncio.Queue[tuple[int, Piece | End]] = asyncio.Queue()
        self._stop_ids = frozenset(stop_ids)
        self.scores: dict[int, Piece] = {}
        loop = asyncio.get_running_loop()
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        asks, listeners = [], []
        self._writers: list[Writer] = []
        for prompt, limit in zip(prompts, limits, strict=True):
            for sample in range(wanted.n):
                ask = Ask(
                    prompt,
                    limit,
                    wanted.temperature,
                    wanted.top_k,
                    wanted.top_p,
                    seed,
                    sample,
                    alternatives=bool(wanted.alternatives),
                    scored=wanted.echo and wanted.alternatives is not None and sample == 0,
                    hurried=wanted.stream,
                )
                asks.append(ask)
                tell = functools.partial(self._tell, loop, len(self._writers))
                listeners.append(tell)
                self._writers.append(Writer(tokenizer, prompt, wanted.stops))
        try:
            self._tickets: list[Ticket] = engine.submit(asks, listeners)
        except Full:
            raise ApiError(429, 'too many requests wait for an answer; try again', code='queue_full') from None

    def _tell(self, loop: asyncio.AbstractEventLoop, choice: int, event: Piece | End) -> None:
        loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

    def cancel(self) -> None:
        """Frees the slots of what is not yet written."""
        for ticket in self._tickets:
            ticket.cancel()

    async def parts(self) -> AsyncIterator[Part]:
        """All that is written, until all answers have ended.

        Raises:
          ApiError: the engine failed.
        """
        running = set(range(len(self._writers)))
        while running:
            choice, event = await self._events.get()
            if choice not in running:
                continue
            part = self._part(choice, event)
            if part is None:
                continue
            if part.finish:
                running.discard(choice)
                self._tickets[choice].cancel()
            yield part

    def _part(self, choice: int, event: Piece | End) -> Part | None:
        writer = self._writers[choice]
        if isinstance(event, End):
            if event.reason == 'failed':
                stopping = event.message == 'the server is stopping'
                raise ApiError(503 if stopping else 500, event.message)
            writer.end()
            return Part(choice, *writer.take(ended=True), 'stop' if writer.stopped else event.reason)
        if event.of_prompt:
            self.scores[choice] = event
            return None
        for number, token in enumerate(event.tokens):
            self.written += 1
            if token in self._stop_ids:
                break
            others = event.alternatives[number] if event.alternatives else []
            writer.write(token, event.logprobs[number], others[:MOST_ALTERNATIVES])
            if writer.stopped:
                break
        text, tokens = writer.take()
        finish = 'stop' if writer.stopped else None
        return Part(choice, text, tokens, finish) if text or tokens or finish else None
