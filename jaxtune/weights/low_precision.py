"""Products of linear layers in eight bits, quantised as they are made: the weights themselves stay as they are.

- `fp8`: weights and activations as e4m3, gradients as e5m2 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning",
  arXiv:2209.05433), with one scale a tensor, of its present largest number. All three products of a layer run so.
- `int8`: a scale for each row of activations and for each output of the weight, products of integers with exact sums;
  forward only, gradients are products in the dtype of the activations, by what was not rounded: the straight-through
  estimator (Bengio et al. 2013, arXiv:1308.3432).

With `fp8` a row's result depends on the largest number of its batch, and so on the rows beside it; with `int8` it does
not.

The products are of eight-bit numbers and scaled afterwards. Numbers that are widened and scaled before, for XLA to
match into cuBLASLt's FP8 products, lose that to its Triton products, which it puts first (JAX 0.10.2): these take the
widened numbers, in bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.parallel import device_kind, hardware, platform

KINDS = ('fp8', 'int8')

_WEIGHTS, _GRADIENTS = jnp.float8_e4m3fn, jnp.float8_e5m2
_LARGEST = 127.0  # of int8; -128 stays unused, so that the numbers are symmetric
_TINY = 2.0**-100  # a largest number below counts as this
_EXACT = 2**24 // 127**2  # products of two int8 numbers whose sum float32 holds exactly


def choice(kind: str) -> tuple[str, str]:
    """`kind`, and why it is only emulated here, '' where the device multiplies such numbers."""
    device = device_kind()
    if hardware.multiplies(device, kind):
        return kind, ''
    numbers = '8-bit floats' if kind == 'fp8' else '8-bit integers'
    return kind, f'emulated: {device} is not known to multiply {numbers} faster than bfloat16'


def low_dot(x: jax.Array, kernel: jax.Array, kind: str) -> jax.Array:
    """`[..., in] -> [..., out]` in the dtype of `x`.

    Args:
      x: the activations.
      kernel: `[in, out]`, in the dtype of `x`.
      kind: one of `KINDS`.
    """
    return _fp8_dot(x, kernel) if kind == 'fp8' else _int8_dot(x, kernel)


def low_forward(x: jax.Array, kernel: jax.Array, kind: str) -> jax.Array:
    """`low_dot`, not differentiable."""
    if kind == 'int8':
        return _int8_product(x, kernel)
    return _product(_scaled(x, _WEIGHTS), _scaled(kernel, _WEIGHTS), (_last(x), (0,)), x.dtype)


def low_backward(d_y: jax.Array, kernel: jax.Array, kind: str) -> jax.Array:
    """The gradient of `x` `[..., in]` by that of the output `[..., out]`, for a kernel that has none."""
    if kind == 'fp8':
        return _product(_scaled(d_y, _GRADIENTS), _scaled(kernel, _WEIGHTS), (_last(d_y), (1,)), d_y.dtype)
    return lax.dot_general(d_y, kernel, ((_last(d_y), (1,)), ((), ())))


def _scaled(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`x` over a scale that brings its largest number to the format's own, and the scale, in the dtype of `x`.

    The scale is a power of two: scaling rounds nothing, in any dtype, and costs a floating-point format no precision.
    """
    largest = jnp.abs(x).max().astype(jnp.float32) / float(jnp.finfo(dtype).max)
    bits = lax.bitcast_convert_type(jnp.maximum(largest, _TINY), jnp.int32)
    mantissa = jnp.int32(0x007FFFFF)
    scale = lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32).astype(x.dtype)
    return (x * (1 / scale)).astype(dtype), scale


def _product(left: Any, right: Any, contracted: tuple[Any, Any], dtype: Any) -> jax.Array:
    """The product of two `_scaled` arrays over these dimensions of theirs.

    Args:
      left: numbers and their scale.
      right: the same.
      contracted: dimensions of both.
      dtype: of the result.
    """
    (q_left, left_scale), (q_right, right_scale) = left, right
    if not hardware.multiplies(device_kind(), 'fp8'):  # the same numbers, in a dtype that it multiplies
        q_left, q_right = q_left.astype(dtype), q_right.astype(dtype)
    y = lax.dot_general(q_left, q_right, (contracted, ((), ())), preferred_element_type=dtype)
    return y * left_scale.astype(dtype) * right_scale.astype(dtype)


def _last(x: jax.Array) -> tuple[int, ...]:
    return (x.ndim - 1,)


def _rows(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


@jax.custom_vjp
def _fp8_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return low_forward(x, kernel, 'fp8')


def _fp8_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    # Activations are kept in eight bits; a kernel is there anyway.
    q_x = _scaled(x, _WEIGHTS)
    y = _product(q_x, _scaled(kernel, _WEIGHTS), (_last(x), (0,)), x.dtype)
    return checkpoint_name(y, 'product'), (q_x, kernel)


def _fp8_backward(residuals: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_x, kernel = residuals
    q_d = _scaled(d_y, _GRADIENTS)
    d_x = _product(q_d, _scaled(kernel, _WEIGHTS), (_last(d_y), (1,)), d_y.dtype)
    return d_x, _product(q_x, q_d, (_rows(d_y), _rows(d_y)), kernel.dtype)


_fp8_dot.defvjp(_fp8_forward, _fp8_backward)


def _rounded(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 numbers, and the float32 scales that they share along an axis."""
    largest = jnp.maximum(jnp.abs(x).max(axis, keepdims=True).astype(jnp.float32), _TINY)
    # Multiplied, not divided: a division by each of many numbers takes longer on a TPU than all else here.
    return jnp.round(x.astype(jnp.float32) * (_LARGEST / largest)).astype(jnp.int8), largest / _LARGEST


def _int8_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    (q_x, x_scale), (q_w, w_scale) = _rounded(x, -1), _rounded(kernel, 0)
    if platform() == 'cpu' and len(kernel) <= _EXACT:  # the same sums, by a library's product
        total = jnp.dot(q_x.astype(jnp.float32), q_w.astype(jnp.float32))
    else:
        total = jnp.dot(q_x, q_w, preferred_element_type=jnp.int32).astype(jnp.float32)
    return checkpoint_name((total * x_scale * w_scale).astype(x.dtype), 'product')


@jax.custom_vjp
def _int8_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _int8_product(x, kernel)


def _int8_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return _int8_product(x, kernel), (x, kernel)


def _int8_backward(residuals: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    d_kernel = lax.dot_general(x, d_y, ((_rows(x), _rows(x)), ((), ())))
    return low_backward(d_y, kernel, 'int8'), d_kernel


_int8_dot.defvjp(_int8_forward, _int8_backward)
