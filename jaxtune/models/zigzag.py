"""Zigzag order of a row's queries over devices: each has an early and a late chunk, and all have as much to do.

Under a causal mask a query sees every key before it. Were queries divided in their order, the last of `n` devices would
have `2 - 1 / n` times the mean to do, and all the others would wait for it. So a row is cut into `2 n` chunks, and the
device `i` attends for chunks `i` and `2 n - 1 - i` (Llama 3's context parallelism, arXiv:2407.21783, section 3.3.2).
Tokens lie in their order everywhere else: devices exchange queries before attention and outputs after it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_AXIS = 'sequence'
_MULTIPLE = 128  # tokens that a chunk must be a multiple of: kernels' blocks lie in one chunk
# A query and its output move in about the time that the forward pass takes for so many pairs of it and a key; and so
# do their gradients in the backward pass's.
_LEAST = 1024


def busiest(length: int, shards: int, window: int | None, zigzag: bool) -> int:
    """Pairs of queries and keys that the device with most of them has in one row, under a causal mask.

    Args:
      length: tokens of a row, a multiple of the shards, and with `zigzag` of twice as many.
      shards: devices that queries are divided over.
      window: sliding window in tokens, or None.
      zigzag: queries are in zigzag order, and not in their own.
    """
    seen = np.minimum(np.arange(1, length + 1), window or length)
    chunks = seen.reshape(shards * (2 if zigzag else 1), -1).sum(1)
    return int(((chunks + chunks[::-1]) if zigzag else chunks).max())


def pays(length: int, shards: int, window: int | None = None, causal: bool = True) -> bool:
    """Whether what the busiest device has less to do in zigzag order is worth the exchange of queries and outputs."""
    if shards == 1 or not causal or length % (2 * shards * _MULTIPLE):
        return False
    saved = busiest(length, shards, window, False) - busiest(length, shards, window, True)
    return saved * shards >= _LEAST * length


def attended(length: int, shards: int, window: int | None = None, traced: bool = False) -> float:
    """Share of all pairs that causal attention needs, as if every device had as much to do as the busiest one.

    `traced`: the window differs by layer, and the order is that of layers without one.
    """
    shards = shards if length % shards == 0 else 1  # what does not divide the length leaves it whole
    ordered = pays(length, shards, None if traced else window)
    return busiest(length, shards, window, ordered) * shards / length**2


def positions(length: int, shards: int) -> np.ndarray:
    """int32 `[length]`: the place in the row of each query, device after device."""
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[::-1][:shards]], 1).reshape(-1)


def starts(length: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """Where this device's two chunks begin; inside `shard_map`. `length` is the whole row's."""
    size, own = length // (2 * shards), lax.axis_index(_AXIS)
    return own * size, (2 * shards - 1 - own) * size


def spread(x: jax.Array, shards: int) -> jax.Array:
    """This device's `[batch, length / shards, ...]` in the row's order -> those of its two chunks; in `shard_map`."""
    first, second = jnp.split(x, 2, axis=1)
    return _ordered(lax.ppermute(first, _AXIS, _moves(shards, 0)), lax.ppermute(second, _AXIS, _moves(shards, 1)))


def restore(x: jax.Array, shards: int) -> jax.Array:
    """Undoes `spread`."""
    first, second = jnp.split(_ordered(*jnp.split(x, 2, axis=1)), 2, axis=1)
    return jnp.concatenate(
        [lax.ppermute(half, _AXIS, _back(_moves(shards, odd))) for odd, half in enumerate((first, second))], 1
    )


def _ordered(first: jax.Array, second: jax.Array) -> jax.Array:
    """Chunks of even and of odd number -> the earlier and the later one, or the other way round.

    Of the chunks `i` and `2 n - 1 - i` the one has an even number, the other an odd one.
    """
    odd = lax.axis_index(_AXIS) % 2 == 1
    return jnp.concatenate([jnp.where(odd, second, first), jnp.where(odd, first, second)], 1)


def _moves(shards: int, odd: int) -> list[tuple[int, int]]:
    """From which device to which the chunks of even or odd number go: those of each a permutation."""
    return [(i, min(2 * i + odd, 2 * shards - 1 - (2 * i + odd))) for i in range(shards)]


def _back(moves: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(there, here) for here, there in moves]
