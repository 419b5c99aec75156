"""Shapes that pure functions promise are checked while they are traced; the message names the argument."""

import jax
import jax.numpy as jnp
import pytest

from jaxtune.models import rope
from jaxtune.models.attention import attention
from jaxtune.models.kv_cache import attend_one
from jaxtune.optim.stochastic_rounding import to_bfloat16
from jaxtune.weights import Codec, dot, lookup

Q, K = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
AT, KEYS = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 5), jnp.int32)
PLACES = {'q_positions': AT, 'k_positions': KEYS, 'q_segment_ids': AT, 'k_segment_ids': KEYS}
ANGLES = (jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)))


def attend(q=Q, k=K, v=K, **places):
    return attention(q, k, v, **PLACES | places, scale=1.0, self_attention=False, causal=False)


@pytest.mark.parametrize(
    ('function', 'argument'),
    [
        (lambda: attend(k=K[:1]), 'k'),
        (lambda: attend(v=K[:, :4]), 'v'),
        (lambda: attend(q_positions=AT[0]), 'q_positions'),
        (lambda: attend(k_segment_ids=AT), 'k_segment_ids'),
        (lambda: attend(q_segment_ids=AT.astype(float)), 'q_segment_ids'),
        (lambda: rope.rotate(Q[0], ANGLES), 'x'),
        (lambda: rope.rotate(Q, (ANGLES[0], ANGLES[1][:1])), 'angles: the sine'),
        (lambda: attend_one(Q, K.swapaxes(1, 2), K.swapaxes(1, 2), KEYS > 0), 'q'),
        (lambda: dot(Q, jnp.ones((7, 2))), 'kernel'),
        (lambda: lookup(jnp.ones((4, 2)), jnp.ones(3), jnp.float32), 'ids'),
        (lambda: Codec().encode(jnp.ones(8)), 'matrix'),
        (lambda: to_bfloat16(jnp.ones(3, jnp.bfloat16), jnp.uint32(1)), 'value'),
    ],
)
def test_a_wrong_shape_names_its_argument(function, argument):
    with pytest.raises(AssertionError, match=rf'\[{argument}|{argument}\]'):
        jax.eval_shape(function)


def test_right_shapes_pass():
    assert jax.eval_shape(attend).shape == Q.shape
    assert jax.eval_shape(lambda: rope.rotate(Q, ANGLES)).shape == Q.shape
