"""Sampling: one jitted prefill of the prompts and one `lax.while_loop` over a key-value cache."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.models import Model


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and when a completion ends.

    Attributes:
      max_new_tokens: maximum length of a completion.
      temperature: logits are divided by it; 0 is greedy.
      top_k: sample from the k most likely tokens; 0 = all.
      top_p: sample from the most likely tokens that together reach this probability (Holtzman et al. 2019,
        arXiv:1904.09751); 1 = all.
      stop_ids: tokens that end a completion; the completion includes them.
      pad_id: fills up a completion after its end.
      tempered: log-probabilities are those at the temperature.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    tempered: bool = False


def from_settings(config: Settings, tokenizer: Any, stops: Iterable[int], vocab_size: int) -> Sampling:
    """The sampling of a recipe's `generate`, which the tokens `stops` end, from a model of `vocab_size` rows."""
    pad = tokenizer.pad_token_id
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_ids=tuple(sorted(set(stops))),
        pad_id=0 if pad is None or pad >= vocab_size else pad,  # one without a row would be read as NaN
    )


class Completions(NamedTuple):
    """Sampled completions.

    Attributes:
      tokens: `[batch, max_new_tokens]` int32, padded after the end.
      lengths: `[batch]` int32, tokens of each completion with its stop token.
      logprobs: `[batch, max_new_tokens]` float32, log-probability of each token under the model itself (no
        filtering; temperature 1 but where `Sampling.tempered`), 0 after the end.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array


def filter_logits(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets the logits `[..., vocab]` outside `top_k` and `top_p` to -inf; the most likely token always stays."""
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens `[batch]` int32 for float32 logits `[batch, vocab]` and keys `[batch]`, one per row."""
    if sampling.temperature == 0:
        return _largest(logits)
    logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return _largest(logits + noise)


def draw_each(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """What `draw` gives, for settings `[batch]` of each row: one compilation for all of them.

    What a row gets is a function of its own logits, key and settings. The vocabulary is sorted only where a row asks
    for it.
    """
    greedy = temperature <= 0

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
        filters = ~greedy & (((top_k > 0) & (top_k < logits.shape[-1])) | (top_p < 1.0))
        left = jax.lax.cond(filters.any(), lambda: _filter_each(scaled, top_k, top_p), lambda: scaled)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        return jnp.where(greedy, _largest(logits), _largest(left + noise))

    return jax.lax.cond(greedy.all(), lambda: _largest(logits), drawn)


def _filter_each(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """What `filter_logits` gives, for `top_k` and `top_p` of each row."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    places = jnp.clip(top_k, 1, logits.shape[-1])[:, None] - 1
    least = jnp.where(top_k[:, None] > 0, jnp.take_along_axis(ordered, places, axis=-1), -jnp.inf)
    ordered = jnp.where(ordered < least, -jnp.inf, ordered)
    chances = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    within = (before < top_p[:, None]) | (top_p[:, None] >= 1.0)
    least = jnp.maximum(least, jnp.min(jnp.where(within, ordered, jnp.inf), axis=-1, keepdims=True))
    return jnp.where(logits < least, -jnp.inf, logits)


def _largest(x: jax.Array) -> jax.Array:
    """Index `[batch]` of the largest value of each row of `[batch, vocab]`, the first of equal ones.

    Two reductions: `argmax` is one over pairs, which XLA:CPU does not vectorise, nor the noise's logarithms with it.
    """
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    first = jnp.where(x == x.max(-1, keepdims=True), places, x.shape[-1]).min(-1)
    return jnp.minimum(first, x.shape[-1] - 1)  # among NaNs there is no largest


def logprob_of(logits: jax.Array, tokens: jax.Array, sampling: Sampling | None = None) -> jax.Array:
    """Log-probabilities `[batch]` of tokens `[batch]` under float32 logits `[batch, vocab]`.

    Those of the model itself, but where a `sampling` wants them at its temperature.
    """
    if sampling is not None and sampling.tempered and sampling.temperature:
        logits = logits / sampling.temperature
    below = logits - logits.max(-1, keepdims=True)
    return jnp.take_along_axis(below, tokens[:, None], axis=-1)[:, 0] - jnp.log(jnp.exp(below).sum(-1))


def sample(
    model: Model, sampling: Sampling, params: Any, prompts: jax.Array, lengths: jax.Array, keys: jax.Array
) -> Completions:
    """Completes prompts; pure, one compilation per shape. A completion depends on its own prompt and key alone.

    Args:
      model: a decoder or an encoder-decoder.
      sampling: how tokens are drawn.
      params: the model's parameters.
      prompts: `[batch, length]` int32, padded right.
      lengths: `[batch]` int32, tokens of each prompt, at least 1.
      keys: `[batch]` typed random keys.
    """
    batch, limit = len(prompts), sampling.max_new_tokens
    stops = jnp.asarray(sampling.stop_ids, jnp.int32)
    hidden, cache, first = model.prefill(params, prompts, lengths, limit)
    laid, head = model.decode_layout(params)

    def take(state: dict[str, Any], hidden: jax.Array, t: jax.Array) -> dict[str, Any]:
        """Draws token `t` from the hidden states `[batch, d_model]` before it."""
        logits = head.logits(hidden)
        now = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, t), sampling)
        logprob = logprob_of(logits, now, sampling)
        running = ~state['done']
        return {
            **state,
            'tokens': state['tokens'].at[:, t].set(jnp.where(running, now, sampling.pad_id)),
            'logprobs': state['logprobs'].at[:, t].set(jnp.where(running, logprob, 0.0)),
            'lengths': state['lengths'] + running,
            'done': state['done'] | jnp.isin(now, stops),
            'now': now,
            't': t + 1,
        }

    def more(state: dict[str, Any]) -> jax.Array:
        return (state['t'] < limit) & ~state['done'].all()

    def step(state: dict[str, Any]) -> dict[str, Any]:
        def row_tokens(row: jax.Array, count: int) -> jax.Array:
            return join_row(jnp.asarray(prompts)[row], jnp.asarray(lengths)[row], state['tokens'][row], count)

        places = first + state['t'] - 1
        hidden, cache = model.step(laid, state['cache'], state['now'], places, ~state['done'], row_tokens)
        return take({**state, 'cache': cache}, hidden, state['t'])

    state = {
        'cache': cache,
        'tokens': jnp.full((batch, limit), sampling.pad_id, jnp.int32),
        'logprobs': jnp.zeros((batch, limit), jnp.float32),
        'lengths': jnp.zeros(batch, jnp.int32),
        'done': jnp.zeros(batch, bool),
    }
    state = jax.lax.while_loop(more, step, take(state, hidden, jnp.int32(0)))
    return Completions(state['tokens'], state['lengths'], state['logprobs'])


def join_row(prompt: jax.Array, length: jax.Array, completion: jax.Array, count: int) -> jax.Array:
    """The first `count` tokens of a prompt `[width]`, of which `length` are its own, and its completion `[limit]`."""
    places = jnp.arange(count, dtype=jnp.int32)
    after = completion.at[places - length].get(mode='clip')
    return jnp.where(places < length, prompt.at[places].get(mode='clip'), after)


class Stream:
    """Completes one prompt at a time, token by token as they are drawn: what `sample` gives, seen at once.

    Args:
      model: a decoder.
      sampling: how tokens are drawn.
      params: the model's parameters.
    """

    def __init__(self, model: Model, sampling: Sampling, params: Any) -> None:
        self.sampling, self.params = sampling, params

        def take(params: Any, hidden: jax.Array, key: jax.Array, t: jax.Array | int) -> jax.Array:
            return draw(model.logits(params, hidden), jax.random.fold_in(key, t)[None], sampling)

        def begin(params: Any, prompt: jax.Array, length: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
            hidden, cache, _ = model.prefill(params, prompt, length, sampling.max_new_tokens)
            return take(params, hidden, key, 0), cache

        def go_on(
            params: Any,
            cache: Any,
            now: jax.Array,
            place: jax.Array,
            key: jax.Array,
            t: jax.Array,
            tokens: jax.Array,
        ) -> tuple[jax.Array, Any]:
            running = jnp.ones(1, bool)
            hidden, cache = model.step(params, cache, now, place, running, lambda row, count: tokens[:count])
            return take(params, hidden, key, t), cache

        self._begin, self._go_on = jax.jit(begin), jax.jit(go_on, donate_argnums=1)

    def __call__(self, prompt: list[int], key: jax.Array) -> Iterator[int]:
        """Yields the tokens of a completion, its stop token last."""
        limit = self.sampling.max_new_tokens
        tokens, lengths = pad_prompts([prompt], self.sampling.pad_id, 128)
        so_far = np.pad(tokens[0], (0, limit), constant_values=self.sampling.pad_id)
        now, cache = self._begin(self.params, tokens, lengths, key)
        for t in range(limit):
            token = int(now[0])
            yield token
            if token in self.sampling.stop_ids or t + 1 == limit:
                return
            so_far[len(prompt) + t] = token
            place = jnp.asarray(lengths) + t
            now, cache = self._go_on(self.params, cache, now, place, key, t + 1, so_far)


def pad_prompts(prompts: list[list[int]], pad_id: int, multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `[batch, length]` int32, padded right to a multiple so that few shapes are compiled, and lengths."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), -(-longest // multiple) * multiple), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)
