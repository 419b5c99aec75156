"""Beam search: the most likely completions among a few hypotheses per prompt.

The score of a finished hypothesis is its log-probability divided by a power of its length; it counts only if it was
among the best when it ended. A row ends when no running hypothesis could still score higher at its present length.
These are the rules of `transformers` (`early_stopping=False`), and results equal its.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.generation.sampling import Completions, Sampling, join_row
from jaxtune.models import Model, kv_cache

_NONE = -1e9  # the score of an empty place for a hypothesis


def beam_search(
    model: Model,
    sampling: Sampling,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    beams: int,
    length_penalty: float = 1.0,
) -> Completions:
    """The best completion of each prompt; pure, one compile per shape.

    Args:
      model: a decoder or an encoder-decoder.
      sampling: `max_new_tokens`, `stop_ids` and `pad_id` of it.
      params: the model's parameters.
      prompts: `[batch, length]` int32, padded right.
      lengths: `[batch]` int32, tokens of each prompt, at least 1.
      beams: hypotheses kept per prompt.
      length_penalty: the power; 0 prefers short completions, larger ones favour long ones.

    Returns:
      Completions of `[batch]` rows; their log-probabilities are the model's own.
    """
    batch, limit = len(prompts), sampling.max_new_tokens
    stops = jnp.asarray(sampling.stop_ids, jnp.int32)
    # Enough candidates that `beams` of them continue, whichever end.
    num_candidates = max(2, 1 + len(sampling.stop_ids)) * beams
    among_best = jnp.arange(num_candidates) < beams

    def advance(state: dict[str, Any], hidden: jax.Array, t: jax.Array) -> dict[str, Any]:
        """Extends all hypotheses by token `t`, given the states `[batch * beams, d_model]` before it."""
        logprobs = jax.nn.log_softmax(model.logits(params, hidden)).reshape(batch, beams, -1)
        vocab = logprobs.shape[-1]
        totals = (state['running']['scores'][..., None] + logprobs).reshape(batch, -1)
        scores, chosen = jax.lax.top_k(totals, num_candidates)
        parents, tokens = chosen // vocab, chosen % vocab
        candidates = _gather(state['running'], parents) | {'scores': scores}
        own = jnp.take_along_axis(logprobs.reshape(batch, -1), chosen, axis=1)
        candidates['tokens'] = candidates['tokens'].at[:, :, t].set(tokens)
        candidates['logprobs'] = candidates['logprobs'].at[:, :, t].set(own)
        candidates['lengths'] = candidates['lengths'] + 1
        ended = jnp.isin(tokens, stops) | (t + 1 == limit)

        running_scores, best = jax.lax.top_k(jnp.where(ended, scores + _NONE, scores), beams)
        running = _gather(candidates, best) | {'scores': running_scores}
        rows = jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(parents, best, axis=1)
        moved = {
            name: state['cache'][name] for name in ('k', 'v')
        }  # the rest is the same for all hypotheses of a prompt
        cache = state['cache'] | kv_cache.by_rows(lambda x, axis: jnp.take(x, rows.reshape(-1), axis), moved)

        size = (t + 1).astype(jnp.float32) ** length_penalty
        counts = ended & among_best & state['improvable'][:, None]
        ending = candidates | {'scores': jnp.where(counts, scores / size, _NONE)}
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state['finished'], ending)
        finished = _gather(both, jax.lax.top_k(both['scores'], beams)[1])
        # Empty places score lower than any running hypothesis, so a row with too few finished ones continues.
        improvable = state['improvable'] & (running_scores[:, 0] / size > finished['scores'][:, -1])
        return {
            'running': running,
            'finished': finished,
            'improvable': improvable,
            'now': jnp.take_along_axis(tokens, best, axis=1).reshape(-1),
            'cache': cache,
            't': t + 1,
        }

    def more(state: dict[str, Any]) -> jax.Array:
        return (state['t'] < limit) & state['improvable'].any()

    hidden, cache, first = model.prefill(params, prompts, lengths, limit)
    first = jnp.repeat(first, beams)

    def step(state: dict[str, Any]) -> dict[str, Any]:
        def row_tokens(row: jax.Array, count: int) -> jax.Array:
            prompt, beam = row // beams, row % beams
            own = jnp.asarray(prompts)[prompt], jnp.asarray(lengths)[prompt]
            return join_row(*own, state['running']['tokens'][prompt, beam], count)

        running = jnp.ones(batch * beams, bool)
        places = first + state['t'] - 1
        hidden, cache = model.step(params, state['cache'], state['now'], places, running, row_tokens)
        return advance({**state, 'cache': cache}, hidden, state['t'])

    empty = {
        'tokens': jnp.full((batch, beams, limit), sampling.pad_id, jnp.int32),
        'logprobs': jnp.zeros((batch, beams, limit), jnp.float32),
        'lengths': jnp.zeros((batch, beams), jnp.int32),
        'scores': jnp.full((batch, beams), _NONE, jnp.float32),
    }
    state = {
        # All hypotheses are the same before the first token: only one may be extended.
        'running': empty | {'scores': empty['scores'].at[:, 0].set(0.0)},
        'finished': empty,
        'improvable': jnp.ones(batch, bool),
        'cache': kv_cache.by_rows(lambda x, axis: jnp.repeat(x, beams, axis), cache),
    }
    state = jax.lax.while_loop(more, step, advance(state, jnp.repeat(hidden, beams, axis=0), jnp.int32(0)))
    best = jax.tree.map(lambda x: x[:, 0], state['finished'])
    return Completions(best['tokens'], best['lengths'], best['logprobs'])


def _gather(hypotheses: dict[str, jax.Array], which: jax.Array) -> dict[str, jax.Array]:
    """Hypotheses `[batch, some, ...]` by their numbers `[batch, chosen]`."""
    rows = jnp.arange(len(which))[:, None]
    return {name: x[rows, which] for name, x in hypotheses.items()}
