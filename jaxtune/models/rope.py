"""Rotary position embeddings and the scalings of their frequencies (Su et al. 2021, arXiv:2104.09864)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.parallel import platform

Angles = tuple[jax.Array, jax.Array]  # cosine and sine, each `[batch, length, rotary_dim / 2]` float32

TYPES = ('default', 'linear', 'dynamic', 'yarn', 'longrope', 'llama3', 'proportional')


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """The base of the frequencies grows with a segment that reaches beyond the pretraining's positions.

    Attributes:
      theta: the base of shorter segments.
      factor: how fast it grows.
      dim: how many of a head's dimensions turn.
    """

    theta: float
    factor: float
    dim: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of one model, fixed when it is built.

    Attributes:
      frequencies: `[rotary_dim / 2]` radians a position.
      long_frequencies: LongRoPE's frequencies for segments that reach beyond `original_positions`, else None.
      dynamic: how segments that reach beyond `original_positions` get frequencies of their own, else None.
      original_positions: positions of the pretraining, for LongRoPE and `dynamic`.
      factor: multiplies cosine and sine (YaRN's and LongRoPE's attention factor).
    """

    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] | None = None
    dynamic: DynamicNTK | None = None
    original_positions: int = 0
    factor: float = 1.0


def make_rope(parameters: Mapping, rotary_dim: int, max_positions: int) -> Rope:
    """Frequencies from Hugging Face's `rope_parameters`.

    Args:
      parameters: `rope_type`, `rope_theta` and what the type needs (`factor`, `original_max_position_embeddings`, …).
      rotary_dim: how many of a head's dimensions turn; of `proportional`, among how many those that turn are.
      max_positions: the model's `max_position_embeddings`.

    Raises:
      ValueError: an unknown type, a key that its type needs is missing, or numbers that give no finite frequencies.
    """
    kind, theta = parameters.get('rope_type', 'default'), parameters.get('rope_theta')
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f'rope_type={kind!r:.60}: expected one of {", ".join(TYPES)}')
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ValueError(f'rope_theta={theta!r:.60}: expected a finite number > 0')
    if rotary_dim < 1:
        raise ValueError(f'{rotary_dim} dimensions of a head would turn: expected at least 1')
    try:
        with np.errstate(all='ignore'):
            rope = _SCALINGS[kind](parameters, float(theta), rotary_dim, max_positions)
    except KeyError as error:
        raise ValueError(f'rope_type={kind!r} needs the key {error.args[0]!r}') from None
    except (ArithmeticError, TypeError) as error:  # a factor of 0, a text where a number belongs
        raise ValueError(f'rope_type={kind!r}: expected finite numbers: {error}') from None
    if not np.isfinite([*rope.frequencies, *(rope.long_frequencies or ()), rope.factor]).all():
        raise ValueError(f'rope_type={kind!r}: expected numbers that give finite frequencies')
    return rope


# Frequencies are rounded to float32 after each operation, in the order of `transformers`, as those a checkpoint was
# trained with: at position 100,000 one unit in the last place of a frequency is an angle of up to 0.006.
_F32 = np.float32


def _powers(theta: float, dim: int) -> np.ndarray:
    """`theta ** (2i / dim)`, float32, exponent and power each correctly rounded."""
    exponents = np.arange(0, dim, 2).astype(_F32) / _F32(dim)
    return (np.float64(_F32(theta)) ** exponents.astype(np.float64)).astype(_F32)


def _rope(frequencies: np.ndarray, **rest: Any) -> Rope:
    return Rope(tuple(float(f) for f in frequencies), **rest)


def _default_frequencies(theta: float, dim: int) -> np.ndarray:
    return _F32(1) / _powers(theta, dim)


def _default(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    return _rope(_default_frequencies(theta, dim))


def _linear(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    return _rope(_default_frequencies(theta, dim) / _F32(parameters['factor']))


def _dynamic(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    if dim <= 2:
        raise ValueError(f"rope_type='dynamic': expected more than {dim} dimensions of a head that turn")
    dynamic = DynamicNTK(theta, float(parameters['factor']), dim)
    return _rope(_default_frequencies(theta, dim), dynamic=dynamic, original_positions=max_positions)


def _proportional(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    """Only the first pairs turn, at the frequencies that they have where all do (Gemma 4)."""
    turning = int(parameters.get('partial_rotary_factor', 1.0) * dim // 2)
    frequencies = np.pad(_default_frequencies(theta, dim)[:turning], (0, max(0, dim // 2 - turning)))
    return _rope(frequencies / _F32(parameters.get('factor', 1.0)))


def magnitude(scale: float, weight: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by where positions are stretched by `scale`."""
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _yarn(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    """Peng et al. 2023, arXiv:2309.00071."""
    original = parameters['original_max_position_embeddings']
    factor = parameters['factor'] or max_positions / original

    attention_factor = parameters.get('attention_factor')
    if attention_factor is None:
        top, bottom = parameters.get('mscale'), parameters.get('mscale_all_dim')
        attention_factor = magnitude(factor, top) / magnitude(factor, bottom) if top and bottom else magnitude(factor)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(parameters.get('beta_fast') or 32), dimension_of(parameters.get('beta_slow') or 1)
    if parameters.get('truncate', True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(dim // 2, dtype=_F32) - _F32(low)) / _F32(high - low), _F32(0), _F32(1))
    share, powers = _F32(1) - ramp, _powers(theta, dim)
    interpolated, extrapolated = _F32(1) / (_F32(factor) * powers), _F32(1) / powers
    return _rope(interpolated * (_F32(1) - share) + extrapolated * share, factor=attention_factor)


def _longrope(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    """Ding et al. 2024, arXiv:2402.13753."""
    original = parameters['original_max_position_embeddings']
    factor = parameters.get('factor') or max_positions / original
    attention_factor = parameters.get('attention_factor')
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (
        _F32(1) / (np.asarray(parameters[name], _F32) * _powers(theta, dim)) for name in ('short_factor', 'long_factor')
    )
    return _rope(
        short,
        long_frequencies=tuple(float(f) for f in long),
        original_positions=original,
        factor=attention_factor,
    )


def _llama3(parameters: Mapping[str, Any], theta: float, dim: int, max_positions: int) -> Rope:
    """Low frequencies are divided by `factor`, high ones kept, those between blended (Llama 3.1)."""
    frequencies, factor = _default_frequencies(theta, dim), _F32(parameters['factor'])
    low, high = parameters['low_freq_factor'], parameters['high_freq_factor']
    original = parameters['original_max_position_embeddings']
    lengths = _F32(1) / frequencies * _F32(2 * math.pi)
    is_long, is_short = lengths > _F32(original / low), lengths < _F32(original / high)
    smooth = (_F32(1) / lengths * _F32(original) - _F32(low)) / _F32(high - low)
    blended = (_F32(1) - smooth) * frequencies / factor + smooth * frequencies
    return _rope(np.where(is_long, frequencies / factor, np.where(is_short, frequencies, blended)))


_SCALINGS = {
    'default': _default,
    'linear': _linear,
    'dynamic': _dynamic,
    'yarn': _yarn,
    'longrope': _longrope,
    'llama3': _llama3,
    'proportional': _proportional,
}


def angles(rope: Rope, positions: jax.Array, segment_ids: jax.Array | None = None) -> Angles:
    """Cosine and sine of every position's angles.

    Args:
      rope: the model's frequencies.
      positions: `[batch, length]` int32.
      segment_ids: `[batch, length]` int32, or None where a row is one segment. With LongRoPE and `dynamic` a segment's
        own length decides which frequencies it gets, so that it depends on no other row and on no neighbour in its row.
        What all segments see (below 0) and padding (0) go by the longest of the row.
    """
    chex.assert_rank(positions, 2, custom_message='positions')
    if segment_ids is not None:
        chex.assert_shape(segment_ids, positions.shape, custom_message='segment_ids')
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long_frequencies is not None:
        beyond = positions >= rope.original_positions
        is_long = beyond.any(axis=-1, keepdims=True)
        if segment_ids is not None and positions.shape[-1] > rope.original_positions:
            own = _largest_of_segment(beyond.astype(jnp.int32), segment_ids) > 0
            is_long = jnp.where(segment_ids > 0, own, is_long)
        frequencies = jnp.where(is_long[..., None], jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
    elif rope.dynamic is not None:
        last = positions.max(axis=-1, keepdims=True)
        if segment_ids is not None:
            last = jnp.where(segment_ids > 0, _largest_of_segment(positions, segment_ids), last)
        frequencies = _grown(rope.dynamic, rope.original_positions, last + 1, frequencies)
    turned = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(turned) * rope.factor, jnp.sin(turned) * rope.factor


def _grown(dynamic: DynamicNTK, original: int, lengths: jax.Array, frequencies: jax.Array) -> jax.Array:
    """NTK-aware frequencies `[batch, length, rotary_dim / 2]` of tokens whose segments have these lengths."""
    growth = dynamic.factor * jnp.maximum(lengths, original).astype(jnp.float32) / original - (dynamic.factor - 1)
    bases = dynamic.theta * growth ** (dynamic.dim / (dynamic.dim - 2))
    exponents = jnp.arange(0, dynamic.dim, 2, dtype=jnp.float32) / dynamic.dim
    return jnp.where(lengths[..., None] > original, 1 / bases[..., None] ** exponents, frequencies)


def _largest_of_segment(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The largest value among all tokens of the same segment, `[batch, length]` int32."""

    def of_row(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
        most = jax.ops.segment_max(values, segment_ids, len(segment_ids) + 1)
        return most[jnp.clip(segment_ids, 0, len(segment_ids))]

    return jax.vmap(of_row)(values, segment_ids)


def border(ropes: Sequence[Rope | None]) -> int | None:
    """The first position that changes the angles of all before it: LongRoPE's first long one; None = there is none."""
    borders = (rope.original_positions for rope in ropes if rope is not None and rope.long_frequencies is not None)
    return min(borders, default=None)


def layer_angles(ropes: Sequence[Rope | None], positions: jax.Array, segment_ids: jax.Array) -> Angles | None:
    """The angles that the layers of a model turn by, for `of_layer`.

    Args:
      ropes: each layer's frequencies, or None where a layer does not turn.
      positions: as for `angles`.
      segment_ids: as for `angles`.

    Returns:
      None if no layer turns; what `angles` gives where all turn alike; else the same for each distinct one of `ropes`,
      stacked on a first axis.
    """
    kinds = tuple(dict.fromkeys(ropes))
    turned = [None if rope is None else angles(rope, positions, segment_ids) for rope in kinds]
    some = next((pair for pair in turned if pair is not None), None)
    if some is None or len(turned) == 1:
        return some
    still = jnp.ones_like(some[0]), jnp.zeros_like(some[1])
    cos, sin = zip(*(pair or still for pair in turned), strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def of_layer(angles: Angles | None, ropes: Sequence[Rope | None], number: jax.Array) -> Angles | None:
    """One layer's part of what `layer_angles` gives; `number` counts from 0 and may be traced."""
    if angles is None or angles[0].ndim == 3:
        return angles
    kinds = tuple(dict.fromkeys(ropes))
    place = jnp.asarray([kinds.index(rope) for rope in ropes], jnp.int32)[number]
    cos, sin = (jax.lax.dynamic_index_in_dim(part, place, keepdims=False) for part in angles)
    return cos, sin


def halves_from_pairs(x: jax.Array, rotary_dim: int) -> jax.Array:
    """The first `rotary_dim` dimensions of each head reordered: from pairs that lie side by side to pairs of halves.

    Queries and keys that are both reordered have the same scores.
    """
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    halves = turning.reshape(*turning.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(turning.shape)
    return jnp.concatenate([halves, rest], axis=-1) if rest.shape[-1] else halves


def pairs_from_halves(x: jax.Array, rotary_dim: int) -> jax.Array:
    """The inverse of `halves_from_pairs`."""
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = turning.reshape(*turning.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(turning.shape)
    return jnp.concatenate([pairs, rest], axis=-1) if rest.shape[-1] else pairs


def rotate(x: jax.Array, angles: Angles | None) -> jax.Array:
    """Turns the first `rotary_dim` dimensions of `[batch, length, heads, head_dim]`, pairing halves, in float32.

    None leaves `x` as it is: a model without rotary positions.
    """
    if angles is None:
        return x
    cos, sin = angles
    chex.assert_rank(x, 4, custom_message='x')
    chex.assert_shape(cos, (*x.shape[:2], None), custom_message='angles: the cosine')
    chex.assert_shape(sin, cos.shape, custom_message='angles: the sine')
    half = cos.shape[-1]
    turn = _turn_pairs if platform() == 'cpu' else _turn_halves
    turned = turn(x[..., : 2 * half].astype(jnp.float32), cos[:, :, None], sin[:, :, None]).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def _turn_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _turn_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs with the halves as a dimension that is reversed.

    That is a loop of vectors, where XLA:CPU asks of every number of a concatenation which half it is in. A TPU would
    lay such a dimension out anew.
    """
    pairs = x.reshape(*x.shape[:-1], 2, -1)
    turned = pairs * cos[..., None, :] + pairs[..., ::-1, :] * jnp.stack([-sin, sin], axis=-2)
    return turned.reshape(x.shape)
