"""Sampling with slots: a queue of answers to be written, and a compiled loop that gives each free slot the next one.

The loop has a fixed number of slots, each with its row of the cache. A slot whose answer ends takes the next answer of
the queue before the following step, so that short answers do not wait for long ones. Prompts are read ahead, a few at a
time and each once: the keys and values of a prompt are copied to every slot that answers it. What a slot computes is
its own row's alone, and the randomness of an answer is a function of the seed, its prompt's number and its own number
among that prompt's answers: an answer is the same in any slot, order and batch.

The cache has room for what is there: where an answer outgrows it the loop returns, and `grow` gives it more.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.generation.sampling import Completions, Sampling, draw, join_row, logprob_of
from jaxtune.models import Model, kv_cache
from jaxtune.models.model import virtual_tokens

State = dict[str, Any]

_LEAST_WIDTH = 64  # tokens that prompts are read in at least, where the queue has longer ones


class Queue(NamedTuple):
    """Answers to be written, in their order.

    Attributes:
      prompts: `[prompts, length]` int32, padded right; as many as are read at a time, or a multiple.
      lengths: `[prompts]` int32, tokens of each prompt, at least 1.
      prompt: `[answers]` int32, which prompt each answers, rising by 0 or 1.
      number: `[answers]` int32, the prompt's number in the data, for its key.
      sample: `[answers]` int32, the answer's number among those to its prompt, for its key.
      limit: `[answers]` int32, tokens that each may have, at least 1.
      wanted: int32, how many answers there are; the rest of the arrays is padding.
    """

    prompts: jax.Array
    lengths: jax.Array
    prompt: jax.Array
    number: jax.Array
    sample: jax.Array
    limit: jax.Array
    wanted: jax.Array


class Slots(NamedTuple):
    """The sizes of the loop.

    Attributes:
      slots: answers that are written at a time.
      reads: prompts that are read at a time.
      room: tokens that a row of the cache has room for, beside a trained prompt; more than a prompt has.
    """

    slots: int
    reads: int
    room: int


def answer_keys(root: jax.Array, number: jax.Array, sample: jax.Array) -> jax.Array:
    """The key of each answer `[answers]`, of its prompt's number and its own among those to that prompt."""
    fold = jax.vmap(jax.random.fold_in, (0, 0))
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(root, number), sample)


def begin(model: Model, sampling: Sampling, sizes: Slots, params: Any, queue: Queue) -> State:
    """Slots without an answer, and a cache of nothing; pure."""
    width = queue.prompts.shape[1]
    more = sizes.room - width if model.kind == 'decoder' else sizes.room

    def read(count: int, room: int) -> tuple[jax.Array, kv_cache.Cache, jax.Array]:
        return _read(model, params, jnp.zeros((count, width), jnp.int32), jnp.ones(count, jnp.int32), room)

    def empty(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    logits, ahead, first = empty(jax.eval_shape(lambda: read(sizes.reads, 1)))
    _, cache, _ = jax.eval_shape(lambda: read(sizes.slots, more))
    answers, limit = len(queue.prompt), sampling.max_new_tokens
    none = jnp.zeros(sizes.slots, jnp.int32)
    return {
        'cache': empty(cache),
        'ahead': {'cache': ahead, 'logits': logits, 'first': first, 'from': jnp.int32(-sizes.reads)},
        'slots': {
            'answer': none + answers,
            'place': none,
            'made': none,
            'now': none + sampling.pad_id,
            'running': none.astype(bool),
            'match': none,
        },
        'done': Completions(
            jnp.full((answers, limit), sampling.pad_id, jnp.int32),
            jnp.zeros(answers, jnp.int32),
            jnp.zeros((answers, limit), jnp.float32),
        ),
        'next': jnp.int32(0),
        'steps': jnp.int32(0),
        'written': jnp.int32(0),
    }


def finished(state: State, queue: Queue) -> jax.Array:
    """Whether every answer of the queue is written; bool."""
    return (state['next'] >= queue.wanted) & ~state['slots']['running'].any()


def grow(cache: kv_cache.Cache, room: int) -> kv_cache.Cache:
    """The cache with room for so many tokens more."""

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))

    return {**cache, **{name: jax.tree.map(padded, cache[name]) for name in ('k', 'v')}}


def advance(
    model: Model,
    sampling: Sampling,
    params: Any,
    root: jax.Array,
    queue: Queue,
    state: State,
    watch: jax.Array | None = None,
) -> State:
    """Writes answers until all are written, or one needs more room than the cache has; pure.

    Args:
      model: a decoder or an encoder-decoder.
      sampling: how tokens are drawn.
      params: the model's parameters.
      root: the key that those of the answers are made of.
      queue: what is to be written.
      state: from `begin`, or the last call's.
      watch: `[states, vocab]`, the automaton of texts that end an answer too (`stop_texts.automaton`).

    Returns:
      The state: `done` has the answers, `finished` tells whether they are all; `steps` counts the steps of the loop,
      and `written` the tokens that its slots wrote in them.
    """
    keys = answer_keys(root, queue.number, queue.sample)
    stops = jnp.asarray(sampling.stop_ids, jnp.int32)
    reads = len(state['ahead']['first'])
    laid, head = model.decode_layout(params)

    def ended(tokens: jax.Array, made: jax.Array, answer: jax.Array, match: jax.Array) -> jax.Array:
        over = jnp.isin(tokens, stops) | (made >= queue.limit.at[answer].get(mode='clip'))
        return over if watch is None else over | (match == len(watch) - 1)

    def matched(match: jax.Array, tokens: jax.Array) -> jax.Array:
        return match if watch is None else watch[match, tokens].astype(jnp.int32)

    def put(done: Completions, at: jax.Array, t: jax.Array, tokens: jax.Array, logprobs: jax.Array) -> Completions:
        """The answers with one token more; nothing is written at those beyond the last."""
        return Completions(
            done.tokens.at[at, t].set(tokens, mode='drop'),
            done.lengths.at[at].set(t + 1, mode='drop'),
            done.logprobs.at[at, t].set(logprobs, mode='drop'),
        )

    def missing(ahead: State, number: jax.Array) -> jax.Array:
        return (number < ahead['from']) | (number >= ahead['from'] + reads)

    def read_ahead(number: jax.Array) -> State:
        low = number // reads * reads
        prompts = jax.lax.dynamic_slice_in_dim(queue.prompts, low, reads)
        lengths = jax.lax.dynamic_slice_in_dim(queue.lengths, low, reads)
        widths = _widths(prompts.shape[1]) if model.kind == 'decoder' else [prompts.shape[1]]

        def read(width: int) -> tuple[jax.Array, kv_cache.Cache, jax.Array]:
            logits, cache, first = _read(model, params, prompts[:, :width], lengths, 1)
            return logits, grow(cache, prompts.shape[1] - width) if width < prompts.shape[1] else cache, first

        enough = sum((lengths.max() <= width).astype(jnp.int32) for width in widths[1:])
        logits, cache, first = jax.lax.switch(enough, [lambda width=width: read(width) for width in widths])
        return {'cache': cache, 'logits': logits, 'first': first, 'from': low}

    def waits(state: State) -> jax.Array:
        return (state['next'] < queue.wanted) & ~state['slots']['running'].all()

    def take(state: State) -> State:
        """Gives a free slot the next answer, and draws its first token."""
        answer, slots, prompt = state['next'], state['slots'], queue.prompt[state['next']]
        # No loop of one pass or none: XLA would lay out weights for it before it, in every pass of this one.
        old = state['ahead']
        ahead = jax.lax.cond(missing(old, prompt), lambda: read_ahead(prompt), lambda: old)
        row, slot = prompt - ahead['from'], jnp.argmin(slots['running'])
        logits = jax.lax.dynamic_slice_in_dim(ahead['logits'], row, 1)
        tokens = draw(logits, jax.random.fold_in(keys[answer], 0)[None], sampling)
        match = matched(jnp.int32(0), tokens[0])
        over = ended(tokens[0], jnp.int32(1), answer, match)
        own = {'answer': answer, 'place': ahead['first'][row], 'made': 1, 'now': tokens[0], 'running': ~over}
        own['match'] = match
        return {
            **state,
            'cache': copy_row(ahead['cache'], row, state['cache'], slot),
            'ahead': ahead,
            'slots': {name: x.at[slot].set(own[name]) for name, x in slots.items()},
            'done': put(
                state['done'], answer[None], jnp.zeros(1, jnp.int32), tokens, logprob_of(logits, tokens, sampling)
            ),
            'next': answer + 1,
        }

    def step(state: State) -> State:
        """One token more in every slot that has an answer."""
        slots, done, running = state['slots'], state['done'], state['slots']['running']

        def row_tokens(row: jax.Array, count: int) -> jax.Array:
            answer = slots['answer'][row]
            prompt = queue.prompt[answer]
            return join_row(queue.prompts[prompt], queue.lengths[prompt], done.tokens[answer], count)

        hidden, cache = model.step(laid, state['cache'], slots['now'], slots['place'], running, row_tokens)
        logits = head.logits(hidden)
        own = jax.vmap(jax.random.fold_in)(keys.at[slots['answer']].get(mode='clip'), slots['made'])
        now, made = draw(logits, own, sampling), slots['made'] + running
        at = jnp.where(running, slots['answer'], len(queue.prompt))
        match = matched(slots['match'], now)
        return {
            **state,
            'cache': cache,
            'slots': {
                'answer': slots['answer'],
                'place': slots['place'] + running,
                'made': made,
                'now': now,
                'running': running & ~ended(now, made, slots['answer'], match),
                'match': match,
            },
            'done': put(done, at, slots['made'], now, logprob_of(logits, now, sampling)),
            'steps': state['steps'] + 1,
            'written': state['written'] + running.sum(dtype=jnp.int32),
        }

    room = kv_cache.slots(state['cache']) - (virtual_tokens(params) if model.kind == 'decoder' else 0)

    def fits(state: State) -> jax.Array:
        slots = state['slots']
        return jnp.where(slots['running'], slots['place'], 0).max() < room

    def more(state: State) -> jax.Array:
        return ~finished(state, queue) & fits(state)

    def steps(state: State) -> jax.Array:
        return state['slots']['running'].any() & fits(state) & ~waits(state)

    def fill_and_step(state: State) -> State:
        return jax.lax.while_loop(steps, step, jax.lax.while_loop(waits, take, state))

    return jax.lax.while_loop(more, fill_and_step, state)


def _widths(width: int) -> list[int]:
    """In what widths prompts are read, the widest first: those of the whole queue, and halves for shorter ones."""
    widths = [width]
    while widths[-1] >= 2 * _LEAST_WIDTH and len(widths) < 4:
        widths.append(-(-widths[-1] // 64) * 32)
    return widths


def _read(
    model: Model, params: Any, prompts: jax.Array, lengths: jax.Array, room: int
) -> tuple[jax.Array, kv_cache.Cache, jax.Array]:
    hidden, cache, first = model.prefill(params, prompts, lengths, room)
    return model.logits(params, hidden), cache, first


def copy_row(source: kv_cache.Cache, row: jax.Array, target: kv_cache.Cache, slot: jax.Array) -> kv_cache.Cache:
    """`target` with a row of `source`, which has as much room or less; what lies after it is never seen."""

    def copy(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(x, row, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(y, own, slot, axis)

    return {
        name: jax.tree.map(
            lambda x, y, axis=int(name not in kv_cache.OF_ALL_LAYERS): copy(x, y, axis), part, target[name]
        )
        for name, part in source.items()
    }
