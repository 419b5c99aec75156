"""Slots that the host fills and frees: the pieces of `slots`' loop, each a small program of its own.

Requests that come and go at any time need the host between steps. `read` reads a prompt, `place` copies its keys and
values into a slot and draws the first token there, `write` draws a few tokens more in every slot. How tokens are drawn
is an array with an entry a slot, so that one compilation serves all requests; what a slot computes is its own row's
alone, and the randomness of an answer is a function of its seed, its own number among those to its prompt, and the
token's number.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.generation.sampling import draw_each, logprob_of
from jaxtune.generation.slots import copy_row, grow
from jaxtune.models import Model, kv_cache
from jaxtune.models.model import Head, Made, virtual_tokens
from jaxtune.parallel import compiler_options

State = dict[str, Any]

_SCORED_AT_A_TIME = 32  # tokens whose logits are held at once


class Laid(NamedTuple):
    """A model's parameters and its projection to the vocabulary as `Model.decode_layout` gives them."""

    params: Any
    head: Head


class Settings(NamedTuple):
    """How the tokens of one slot, or of each `[slots]`, are drawn.

    Attributes:
      temperature: float32; 0 is greedy.
      top_k: int32; 0 = all.
      top_p: float32; 1 = all.
    """

    temperature: Any
    top_k: Any
    top_p: Any


class Drawn(NamedTuple):
    """Tokens `[..., slots]` with their log-probabilities under the model itself, and the likeliest in their places.

    Attributes:
      tokens: int32; -1 where none was drawn.
      logprobs: float32.
      ids: `[..., slots, alternatives]` int32, the likeliest first.
      others: float32, their log-probabilities.
    """

    tokens: jax.Array
    logprobs: jax.Array
    ids: jax.Array
    others: jax.Array


class Read(NamedTuple):
    """A prompt that was read.

    Attributes:
      logits: float32 `[1, vocab]`, of the first new token.
      cache: its keys and values, with no room for more.
      scores: for each token of the prompt what predicts the next one, `[width]`; None where it was not asked for.
    """

    logits: jax.Array
    cache: kv_cache.Cache
    scores: Drawn | None = None


class Programs:
    """The compiled pieces, which all parameter trees of a model share.

    Args:
      model: a decoder.
      mesh: where it runs.
      slots: how many there are.
      stop_ids: tokens that end an answer.
      steps: tokens that `write` draws at most.
      alternatives: how many of the likeliest tokens are told where they are asked for.
    """

    def __init__(
        self, model: Model, mesh: Mesh, slots: int, stop_ids: tuple[int, ...], steps: int = 8, alternatives: int = 20
    ) -> None:
        self.model, self.mesh, self.slots, self.steps = model, mesh, slots, steps
        self.stop_ids = stop_ids
        self._most = min(alternatives, model.config.vocab_size)
        with jax.set_mesh(mesh):
            jit = functools.partial(jax.jit, compiler_options=compiler_options())
        self.read = jit(self._read, static_argnames='scored')
        self.place = jit(self._place, donate_argnums=0, static_argnames='alternatives')
        self.write = jit(self._write, donate_argnums=1, static_argnames='alternatives')
        self.grow = jit(self._grow, static_argnums=1)
        self.free = jit(self._free, donate_argnums=0)
        self.begin = jit(self._begin, static_argnames='room')

    def _begin(self, laid: Laid, room: int) -> State:
        """Slots without an answer, and a cache of nothing for `room` tokens a row."""
        cache = self.model.init_cache(self.slots, virtual_tokens(laid.params) + room)
        none = jnp.zeros(self.slots, jnp.int32)
        return {
            'cache': self._placed(kv_cache.divided(cache, 0)),
            'tokens': jnp.zeros((self.slots, room), jnp.int32),
            'place': none,
            'left': none,
            'made': none,
            'now': none,
            'key': jax.vmap(jax.random.key)(none),
            'settings': Settings(none.astype(jnp.float32), none, none.astype(jnp.float32)),
        }

    def _read(self, laid: Laid, prompt: jax.Array, length: jax.Array, *, scored: bool = False) -> Read:
        """Reads a prompt `[1, width]`, padded right, of `[1]` tokens."""
        model, width = self.model, prompt.shape[1]
        places = jnp.arange(width, dtype=jnp.int32)[None]
        inputs = {'tokens': prompt, 'positions': places, 'segment_ids': (places < length).astype(jnp.int32)}
        cache = model.init_cache(1, virtual_tokens(laid.params) + width)
        cut = isinstance(laid.params.get('layers'), tuple)
        outputs = model.apply(laid.params, inputs, cache=kv_cache.divided(cache, 0) if cut else cache)
        assert outputs.cache is not None  # as one was given
        last = jnp.take_along_axis(outputs.hidden, length[:, None, None] - 1, axis=1)[:, 0]
        read = Read(laid.head.logits(last), outputs.cache if cut else kv_cache.divided(outputs.cache, 0))
        if not scored:
            return read
        return read._replace(scores=self._scores(laid.head, outputs.hidden[0], jnp.roll(prompt[0], -1)))

    def _scores(self, head: Head, hidden: jax.Array, targets: jax.Array) -> Drawn:
        width = len(targets)
        parts = -(-width // _SCORED_AT_A_TIME)
        more = parts * _SCORED_AT_A_TIME - width
        hidden = jnp.pad(hidden, ((0, more), (0, 0))).reshape(parts, _SCORED_AT_A_TIME, -1)
        targets = jnp.pad(targets, (0, more)).reshape(parts, -1)
        scores = jax.lax.map(lambda part: self._told(head.logits(part[0]), part[1], self._most), (hidden, targets))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:width], scores)

    def _told(self, logits: jax.Array, tokens: jax.Array, alternatives: int) -> Drawn:
        """What is told of tokens `[rows]` that were drawn from logits `[rows, vocab]`."""
        if not alternatives:
            none = (len(tokens), 0)
            return Drawn(tokens, logprob_of(logits, tokens), jnp.zeros(none, jnp.int32), jnp.zeros(none, jnp.float32))
        values, ids = jax.lax.top_k(logits, self._most)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return Drawn(tokens, logprob_of(logits, tokens), ids, values - total)

    def _place(
        self,
        state: State,
        read: Read,
        prompt: jax.Array,
        length: jax.Array,
        slot: jax.Array,
        limit: jax.Array,
        seed: jax.Array,
        settings: Settings,
        *,
        alternatives: bool = False,
    ) -> tuple[State, Drawn]:
        """Puts an answer to a prompt that was read into a slot, and draws its first token.

        Args:
          state: with room for as many tokens as the prompt is wide.
          read: the prompt, as it was read.
          prompt: `[1, width]`.
          length: `[1]`.
          slot: int32, which.
          limit: int32, tokens of the answer at most; at least 1.
          seed: uint32 `[3]`: the lower and the upper half of the seed, and the answer's number among those to its
            prompt.
          settings: how its tokens are drawn.
          alternatives: whether the likeliest tokens are told.

        Returns:
          The state, and the token, `[1]`.
        """
        key = jax.random.key(seed[0])
        for part in seed[1:]:
            key = jax.random.fold_in(key, part)
        each = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype)[None], settings, state['settings'])
        token = draw_each(read.logits, jax.random.fold_in(key, 0)[None], *each)
        left = jnp.where(self._ends(token[0]), 0, limit - 1)
        own = {'place': length[0], 'left': left, 'made': 1, 'now': token[0], 'key': key}
        return {
            **state,
            **{name: state[name].at[slot].set(value) for name, value in own.items()},
            'cache': self._placed(copy_row(read.cache, jnp.int32(0), state['cache'], slot)),
            'tokens': jax.lax.dynamic_update_slice(state['tokens'], prompt, (slot, jnp.int32(0))),
            'settings': jax.tree.map(lambda all_slots, x: all_slots.at[slot].set(x[0]), state['settings'], each),
        }, self._told(read.logits, token, alternatives and self._most)

    def _write(self, laid: Laid, state: State, count: jax.Array, *, alternatives: bool = False) -> tuple[State, Drawn]:
        """Draws `count` tokens more, at most `steps`, in every slot that has some left to write.

        The cache must have room for them. Returns the state, and the tokens `[steps, slots]`.
        """
        told = self._told(jnp.zeros((self.slots, self._most)), jnp.zeros(self.slots, jnp.int32), alternatives)
        out = jax.tree.map(lambda x: jnp.zeros((self.steps, *x.shape), x.dtype), told)
        out = out._replace(tokens=out.tokens - 1)

        def more(carry: tuple[jax.Array, State, Drawn]) -> jax.Array:
            return (carry[0] < count) & (carry[1]['left'] > 0).any()

        def step(carry: tuple[jax.Array, State, Drawn]) -> tuple[jax.Array, State, Drawn]:
            t, state, out = carry
            state, told = self._step(laid, state, alternatives)
            return t + 1, state, jax.tree.map(lambda all_steps, x: all_steps.at[t].set(x), out, told)

        _, state, out = jax.lax.while_loop(more, step, (jnp.int32(0), state, out))
        return state, out

    def _step(self, laid: Laid, state: State, alternatives: bool) -> tuple[State, Drawn]:
        running, place = state['left'] > 0, state['place']
        at = jnp.where(running, place, state['tokens'].shape[1])
        tokens = state['tokens'].at[jnp.arange(self.slots), at].set(state['now'], mode='drop')

        def row_tokens(row: jax.Array, count: int) -> jax.Array:
            return tokens[row, :count]

        hidden, cache = self.model.step(laid.params, state['cache'], state['now'], place, running, row_tokens)
        logits = laid.head.logits(hidden)
        keys = jax.vmap(jax.random.fold_in)(state['key'], state['made'])
        settings = state['settings']
        settings = settings._replace(temperature=jnp.where(running, settings.temperature, 0.0))
        now = draw_each(logits, keys, *settings)
        told = self._told(logits, now, alternatives)
        return {
            **state,
            'cache': self._placed(cache),
            'tokens': tokens,
            'place': place + running,
            'made': state['made'] + running,
            'left': jnp.where(self._ends(now), 0, state['left'] - running),
            'now': now,
        }, told._replace(tokens=jnp.where(running, now, -1))

    def _grow(self, state: State, room: int) -> State:
        more = room - state['tokens'].shape[1]
        tokens = jnp.pad(state['tokens'], ((0, 0), (0, more)))
        return {**state, 'cache': self._placed(grow(state['cache'], more)), 'tokens': tokens}

    def _free(self, state: State, slots: jax.Array) -> State:
        """Stops the answers of some slots, bool `[slots]`."""
        return {**state, 'left': jnp.where(slots, 0, state['left'])}

    def _ends(self, tokens: jax.Array) -> jax.Array:
        return jnp.isin(tokens, jnp.asarray(self.stop_ids, jnp.int32))

    def _placed(self, cache: kv_cache.Cache) -> kv_cache.Cache:
        """Heads as the model's lie."""

        def place(leaf: jax.Array) -> jax.Array:
            heads = 'tensor' if leaf.shape[2] % self.mesh.shape['tensor'] == 0 else None
            spec = P(None, None, heads)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(place, cache)


def lay_out(model: Model, mesh: Mesh, trees: Mapping[str, Any]) -> dict[str, Laid]:
    """Parameter trees as they lie best for many calls, once for all of them: what they share, they still share."""
    made: Made = {}
    with jax.set_mesh(mesh):
        return {name: Laid(*model.decode_layout(params, made)) for name, params in trees.items()}
