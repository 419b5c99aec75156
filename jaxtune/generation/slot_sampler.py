"""Answers to any number of prompts by the loop over slots: its shapes and programs, and a cache that grows by need."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.generation import slots
from jaxtune.generation.sampling import Completions, Sampling, pad_prompts
from jaxtune.models import Model
from jaxtune.parallel import BATCH_AXES, batch_shards, compiler_options

_LEAST_ROOM = 128  # tokens that the cache begins with, where an answer may need as many


@dataclasses.dataclass
class Usage:
    """What the slots have done so far.

    Attributes:
      steps: steps of the loop.
      written: tokens written in them.
      tokens: all tokens written, the first ones of the answers among them.
      seconds: that it took.
      slots: how many there are.
    """

    slots: int
    steps: int = 0
    written: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the slots' steps that wrote a token; 1 before any step."""
        return self.occupancy_since(0, 0)

    def occupancy_since(self, steps: int, written: int) -> float:
        """The same since there were so many steps and tokens written in them."""
        steps = self.steps - steps
        return (self.written - written) / (steps * self.slots) if steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Of all calls, compiling included; 0 before any."""
        return self.tokens / self.seconds if self.seconds else 0.0


class SlotSampler:
    """Writes answers in slots that are refilled.

    Args:
      model: a decoder or an encoder-decoder.
      sampling: how tokens are drawn.
      mesh: where it runs.
      count: slots, a multiple of the mesh's `data` times `fsdp`.
      root: the key that those of the answers are made of.
      policy: the parameters, of the trees that a call gets; default: the one tree.
      least_room: tokens that the cache begins with; it doubles where they are too few.
      watch: the automaton of texts that end an answer too, `stop_texts.automaton`.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        mesh: Mesh,
        count: int,
        root: jax.Array,
        policy: Callable[..., Any] = lambda params: params,
        least_room: int = _LEAST_ROOM,
        watch: np.ndarray | None = None,
    ) -> None:
        self.model, self.sampling, self.mesh, self.count = model, sampling, mesh, count
        self.root, self.policy, self.least_room = root, policy, least_room
        self.usage = Usage(count)
        self.watch = None if watch is None else self._whole(watch)

        def begin(sizes: slots.Slots, trees: Sequence[Any], queue: slots.Queue) -> slots.State:
            return self._placed(slots.begin(model, sampling, sizes, policy(*trees), queue))

        def advance(
            trees: Sequence[Any], queue: slots.Queue, state: slots.State, watch: jax.Array | None
        ) -> tuple[slots.State, jax.Array]:
            state = slots.advance(model, sampling, policy(*trees), root, queue, state, watch)
            return self._placed(state), slots.finished(state, queue)

        def grow(room: int, state: slots.State) -> slots.State:
            return self._placed({**state, 'cache': slots.grow(state['cache'], room)})

        options = compiler_options()
        self._begin = jax.jit(begin, static_argnums=0, compiler_options=options)
        self._advance = jax.jit(advance, donate_argnums=2, compiler_options=options)
        self._grow = jax.jit(grow, static_argnums=0, compiler_options=options)

    def __call__(
        self,
        trees: Sequence[Any],
        prompts: Sequence[list[int]],
        counts: Sequence[int] | None = None,
        numbers: Sequence[int] | None = None,
        width: int = 0,
        firsts: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
    ) -> Completions:
        """Answers `[answers]` in the prompts' order, those to one prompt together, as NumPy arrays.

        Args:
          trees: what `policy` makes the parameters of.
          prompts: token ids, at least one each.
          counts: how many answers each gets, at least 1; default: one.
          numbers: of the prompts, for the answers' keys; default: 0, 1, …
          width: tokens that prompts are padded to at least, so that several calls have one shape.
          firsts: of each prompt, the number of its first answer, for the answers' keys; default: 0.
          limits: tokens of an answer to each prompt at most; default: as many as the sampling has.
        """
        started = time.perf_counter()
        # Prompts that are read together have similar lengths, and the longest answers do not begin last.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        prompts = [prompts[i] for i in order]
        counts = [counts[i] if counts else 1 for i in order]
        numbers = [numbers[i] if numbers else i for i in order]
        firsts = [firsts[i] if firsts else 0 for i in order]
        limits = [limits[i] if limits else self.sampling.max_new_tokens for i in order]
        shards = batch_shards(self.mesh)
        reads = -(-min(self.count, -(-self.count // max(counts))) // shards) * shards
        queue = self._queue(prompts, counts, numbers, firsts, limits, reads, width)
        placed = slots.Queue(*map(self._whole, queue))
        rooms = self._rooms(placed.prompts.shape[1])
        state = self._begin(slots.Slots(self.count, reads, rooms[0]), trees, placed)
        for room, following in zip(rooms, [*rooms[1:], None], strict=True):
            state, done = self._advance(trees, placed, state, self.watch)
            if bool(done):
                break
            assert following is not None  # as the last room is enough for the longest answer
            state = self._grow(following - room, state)
        starts = np.cumsum([0, *counts])
        places = {i: range(starts[at], starts[at + 1]) for at, i in enumerate(order)}
        rows = np.asarray([row for i in range(len(prompts)) for row in places[i]])
        found = jax.tree.map(lambda x: np.asarray(x)[rows], state['done'])
        self.usage.steps += int(state['steps'])
        self.usage.written += int(state['written'])
        self.usage.tokens += int(found.lengths.sum())
        self.usage.seconds += time.perf_counter() - started
        return found

    def _queue(
        self,
        prompts: Sequence[list[int]],
        counts: Sequence[int],
        numbers: Sequence[int],
        firsts: Sequence[int],
        limits: Sequence[int],
        reads: int,
        width: int,
    ) -> tuple[np.ndarray, ...]:
        """The fields of the queue, in shapes of which there are few."""
        wanted = sum(counts)
        ids, lengths = pad_prompts(list(prompts), self.sampling.pad_id)
        rows = reads * _power(-(-len(prompts) // reads))
        more = ((0, rows - len(prompts)), (0, max(0, -(-width // 32) * 32 - ids.shape[1])))
        ids = np.pad(ids, more, constant_values=self.sampling.pad_id)
        lengths = np.pad(lengths, (0, rows - len(prompts)), constant_values=1)
        room = (0, self.count * _power(-(-wanted // self.count)) - wanted)
        prompt = np.pad(np.repeat(np.arange(len(prompts), dtype=np.int32), counts), room)
        number = np.pad(np.repeat(np.asarray(numbers, np.int32), counts), room)
        own = [np.arange(first, first + count, dtype=np.int32) for first, count in zip(firsts, counts, strict=True)]
        sample = np.pad(np.concatenate(own), room)
        limit = np.pad(np.repeat(np.asarray(limits, np.int32), counts), room, constant_values=1)
        return ids, lengths, prompt, number, sample, limit, np.asarray(wanted, np.int32)

    def _whole(self, x: np.ndarray) -> jax.Array:
        """An array that every device holds."""
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P()), x, x.shape)

    def _rooms(self, width: int) -> list[int]:
        """What the cache has room for, at first and each time that it grows."""
        limit = self.sampling.max_new_tokens
        before, total = (width, width + limit) if self.model.kind == 'decoder' else (0, limit)
        rooms = [min(total, _power(max(before + 1, self.least_room)))]
        while rooms[-1] < total:
            rooms.append(min(total, 2 * rooms[-1]))
        return rooms

    def _placed(self, state: slots.State) -> slots.State:
        """Keys and values as the model's rows and heads lie; the rest is small, and everywhere whole."""

        def place(leaf: jax.Array) -> jax.Array:
            heads = 'tensor' if leaf.ndim == 5 and leaf.shape[2] % self.mesh.shape['tensor'] == 0 else None
            spec = P(None, BATCH_AXES, heads) if leaf.ndim == 5 else P()
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(place, state)


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, math.ceil(math.log2(max(1, number))))
