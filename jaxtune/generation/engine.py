"""Answers to requests that come and go at any time, written together in slots (`host_slots`) by a thread of its own.

What an answer is depends on its prompt, its settings and its seed alone. Between two of the device's small programs the
thread frees the slots of requests that went away, reads the prompts of those that wait, as many as there are free
slots, and hands out what was written.
"""

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.errors import out_of_memory, reason
from jaxtune.generation.host_slots import Drawn, Laid, Programs, Read, Settings, State
from jaxtune.models.model import virtual_tokens

_LEAST_ROOM = 128  # tokens that a row of the cache begins with
_LEAST_WIDTH = 32  # that a prompt is padded to
_LONGEST = 2**15  # of a prompt with its answer, for a model without a limit of its own
_READS = 4  # prompts that are read while others wait for their next token
_IMPOSSIBLE = -9999.0  # the log-probability of what has none
_FEW = 4  # tokens a slot at a time, where somebody reads along or waits

Alternatives = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Ask:
    """An answer that is wanted.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: of the answer at most; 0 = none is wanted, but the prompt's scores.
      temperature: of sampling; 0 = greedy.
      top_k: sample from the k most likely tokens; 0 = all.
      top_p: sample from the most likely tokens of this total probability; 1 = all.
      seed: of sampling, at least 0.
      sample: the answer's number among those to its prompt.
      alternatives: whether the likeliest tokens are told in each place.
      scored: whether the prompt's own tokens are scored.
      hurried: whether somebody reads along.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    alternatives: bool = False
    scored: bool = False
    hurried: bool = False


class Piece(NamedTuple):
    """Tokens that follow those before.

    Attributes:
      tokens: their ids.
      logprobs: their log-probabilities under the model itself (temperature 1, no filtering).
      alternatives: for each the likeliest tokens in its place, the likeliest first; empty where not asked for.
      of_prompt: these are the prompt's own tokens, from the second one on.
    """

    tokens: list[int]
    logprobs: list[float]
    alternatives: list[Alternatives]
    of_prompt: bool = False


class End(NamedTuple):
    """The end of an answer: `stop` by a token of the model's, `length`, or `failed` with a message."""

    reason: str
    message: str = ''


Listener = Callable[[Piece | End], None]


class Full(Exception):  # noqa: N818
    """As many requests wait as may."""


class Ticket:
    """A request that was taken, to be cancelled when nobody wants it any more."""

    def __init__(self, ask: Ask, listener: Listener, wake: threading.Condition) -> None:
        self.ask, self.written, self.cancelled = ask, 0, False
        self._listener, self._wake = listener, wake

    def cancel(self) -> None:
        """Frees its slot, or its place in the queue; nothing more is told."""
        with self._wake:
            self.cancelled = True
            self._wake.notify_all()

    def tell(self, event: Piece | End) -> None:
        """Tells what was written, or the end; a listener that fails has gone away."""
        try:
            if not self.cancelled:
                self._listener(event)
        except RuntimeError:
            self.cancelled = True


class Engine:
    """Answers with one tree of parameters.

    Args:
      programs: the compiled pieces of the model.
      laid: the parameters.
      context: tokens that a prompt and its answer may have together; 0 = as many as the model has positions.
      max_queue: requests that may wait for a slot.
    """

    def __init__(self, programs: Programs, laid: Laid, context: int = 0, max_queue: int = 256) -> None:
        self._programs, self._laid, self.max_queue = programs, laid, max_queue
        positions = programs.model.config.max_positions or _LONGEST
        self.context = min(context or positions, positions) - virtual_tokens(laid.params)
        self._wake = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._owners: list[Ticket | None] = [None] * programs.slots
        self._state: State | None = None
        self._read: tuple[tuple[int, ...], Read, jax.Array] | None = None
        self._closed = False
        self.tokens = 0  # written so far
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._thread.start()

    def submit(self, asks: list[Ask], listeners: list[Listener]) -> list[Ticket]:
        """Takes requests, all or none; each listener is called from the engine's thread.

        Raises:
          Full: too many wait.
          ValueError: a prompt without tokens, or one that is too long with its answer.
        """
        for ask in asks:
            if not ask.prompt or len(ask.prompt) + ask.max_tokens > self.context:
                raise ValueError(f'{len(ask.prompt)} + {ask.max_tokens} tokens: expected 1 to {self.context}')
        tickets = [Ticket(ask, tell, self._wake) for ask, tell in zip(asks, listeners, strict=True)]
        with self._wake:
            if self._closed:
                for ticket in tickets:
                    ticket.tell(End('failed', 'the server is stopping'))
                return tickets
            waiting = sum(not ticket.cancelled for ticket in self._waiting)
            room = self.max_queue + self._owners.count(None) - waiting
            # Where nothing is to be done, any number is taken: a large request would be refused for ever.
            if len(tickets) > room and (waiting or self.running):
                raise Full
            self._waiting.extend(tickets)
            self._wake.notify_all()
        return tickets

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return sum(owner is not None for owner in self._owners)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closed

    def warm(self) -> str:
        """Has a short answer written, so that what it needs is compiled; returns what failed, '' if nothing."""
        done: queue.Queue[Piece | End] = queue.Queue()
        self.submit([Ask((0,), min(2, self.context - 1), temperature=0.0)], [done.put])
        while not isinstance(event := done.get(), End):
            pass
        return event.message

    def close(self, seconds: float | None = None) -> None:
        """Ends all requests; returns when the thread has ended, or after so many seconds."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join(seconds)

    def _run(self) -> None:
        with jax.set_mesh(self._programs.mesh):
            while not self._closed:
                try:
                    self._turn()
                except Exception as error:
                    # Arrays that were given to a program that failed are gone, whatever it was.
                    self._end_all(out_of_memory(error) or reason(error))
        self._end_all('the server is stopping')

    def _turn(self) -> None:
        """What is done between two programs, and those."""
        with self._wake:
            idle = not (self._waiting or self.running)
        if idle:
            self._read = None
            if self._state is not None and self._room > _LEAST_ROOM:
                self._state = None  # a cache that grew for a long answer
        with self._wake:
            while not (self._closed or self._waiting or self.running):
                self._wake.wait()
        if self._closed:
            return
        self._drop()
        self._fill()
        self._write()

    def _drop(self) -> None:
        """Forgets those who went away."""
        gone = np.asarray([owner is not None and owner.cancelled for owner in self._owners])
        if gone.any():
            self._state = self._programs.free(self._state, gone)
            self._owners = [None if left else owner for owner, left in zip(self._owners, gone, strict=True)]
        with self._wake:
            if any(ticket.cancelled for ticket in self._waiting):
                self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def _fill(self) -> None:
        """Gives free slots to those who wait, the first first."""
        reads, busy = 0, self.running > 0
        while None in self._owners and not (busy and reads >= _READS):
            with self._wake:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            try:
                read, prompt, new = self._read_prompt(ticket.ask)
                reads += new
                if ticket.ask.scored:
                    self._tell_scores(ticket, read)
                if not ticket.ask.max_tokens:
                    ticket.tell(End('length'))
                    continue
                self._make_room(prompt.shape[1])
            except Exception as error:  # what was written for the others is still there
                ticket.tell(End('failed', out_of_memory(error) or reason(error)))
                continue
            self._place(ticket, self._owners.index(None), read, prompt)

    def _read_prompt(self, ask: Ask) -> tuple[Read, jax.Array, bool]:
        """A prompt that was read, padded to `[1, width]`, and whether it was read just now."""
        if self._read is not None and self._read[0] == ask.prompt and (self._read[1].scores or not ask.scored):
            return *self._read[1:], False
        self._read = None
        width = min(max(_LEAST_WIDTH, _power(len(ask.prompt))), self.context)
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ask.prompt)] = ask.prompt
        prompt = jax.numpy.asarray(tokens)
        read = self._programs.read(self._laid, prompt, np.asarray([len(ask.prompt)], np.int32), scored=ask.scored)
        read.logits.block_until_ready()  # what fails, fails here
        self._read = ask.prompt, read, prompt
        return read, prompt, True

    def _tell_scores(self, ticket: Ticket, read: Read) -> None:
        assert read.scores is not None  # as they were asked for
        count = len(ticket.ask.prompt) - 1
        scores = jax.tree.map(lambda x: np.asarray(x)[:count], read.scores)
        ticket.tell(_piece(scores, ticket.ask.alternatives)._replace(of_prompt=True))

    def _place(self, ticket: Ticket, slot: int, read: Read, prompt: jax.Array) -> None:
        ask = ticket.ask
        self._state, token = self._programs.place(
            self._state,
            read,
            prompt,
            np.asarray([len(ask.prompt)], np.int32),
            np.int32(slot),
            np.int32(ask.max_tokens),
            np.asarray([ask.seed & 0xFFFFFFFF, ask.seed >> 32 & 0xFFFFFFFF, ask.sample], np.uint32),
            Settings(np.float32(ask.temperature), np.int32(ask.top_k), np.float32(ask.top_p)),
            alternatives=ask.alternatives,
        )
        self._owners[slot] = ticket
        self._hand_out(slot, jax.device_get(token))

    def _write(self) -> None:
        """A few tokens more for all."""
        owners = [owner for owner in self._owners if owner]
        if not owners:
            return
        count = _FEW if self._waiting or any(owner.ask.hurried for owner in owners) else self._programs.steps
        count = min(count, self._programs.steps)
        needs = {slot: _needs(owner, count) for slot, owner in enumerate(self._owners) if owner}
        try:
            self._make_room(max(needs.values()))
        except Exception as error:
            message = out_of_memory(error) or reason(error)
            gone = np.asarray([needs.get(slot, 0) > self._room for slot in range(len(self._owners))])
            self._state = self._programs.free(self._state, gone)
            for slot in np.flatnonzero(gone).tolist():
                self._end(slot, End('failed', message))
            return
        told = any(owner.ask.alternatives for owner in owners)
        self._state, drawn = self._programs.write(self._laid, self._state, np.int32(count), alternatives=told)
        drawn = jax.device_get(drawn)
        for slot, owner in enumerate(self._owners):
            if owner:
                self._hand_out(slot, jax.tree.map(lambda x, slot=slot: x[:, slot], drawn))

    def _hand_out(self, slot: int, drawn: Drawn) -> None:
        """Tells the owner of a slot its tokens `[count]`, of which those drawn come first."""
        owner = self._owners[slot]
        assert owner is not None  # or there were none
        count = int((drawn.tokens >= 0).sum())
        piece = _piece(jax.tree.map(lambda x: x[:count], drawn), owner.ask.alternatives)
        owner.written += count
        self.tokens += count
        if count:
            owner.tell(piece)
        if count and piece.tokens[-1] in self._programs.stop_ids:
            self._end(slot, End('stop'))
        elif owner.written >= owner.ask.max_tokens:
            self._end(slot, End('length'))

    def _end(self, slot: int, end: End) -> None:
        owner, self._owners[slot] = self._owners[slot], None
        if owner:
            owner.tell(end)

    def _end_all(self, message: str) -> None:
        """Ends all requests."""
        self._state = self._read = None
        with self._wake:
            waiting, self._waiting = self._waiting, collections.deque()
        for ticket in waiting:
            ticket.tell(End('failed', message))
        for slot in range(len(self._owners)):
            self._end(slot, End('failed', message))

    @property
    def _room(self) -> int:
        """Tokens that a row of the cache has room for."""
        return 0 if self._state is None else self._state['tokens'].shape[1]

    def _make_room(self, need: int) -> None:
        room = min(max(_LEAST_ROOM, _power(need)), self.context)
        if self._state is None:
            state = self._programs.begin(self._laid, room=room)
        elif room > self._room:
            state = self._programs.grow(self._state, room)
        else:
            return
        self._state = jax.block_until_ready(state)  # what fails, fails here


def _needs(owner: Ticket, count: int) -> int:
    """Room that a slot needs for so many tokens more; the last token of an answer is not read."""
    ask = owner.ask
    return min(len(ask.prompt) + owner.written - 1 + count, len(ask.prompt) + ask.max_tokens)


def _piece(drawn: Drawn, alternatives: bool) -> Piece:
    others: list[Alternatives] = []
    if alternatives:
        rows = zip(drawn.ids.tolist(), _finite(drawn.others), strict=True)
        others = [list(zip(ids, logprobs, strict=True)) for ids, logprobs in rows]
    return Piece(drawn.tokens.tolist(), _finite(drawn.logprobs), others)


def _finite(logprobs: Any) -> list:
    """Log-probabilities as they can be written in JSON."""
    return np.nan_to_num(np.asarray(logprobs), nan=_IMPOSSIBLE, neginf=_IMPOSSIBLE).tolist()


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
