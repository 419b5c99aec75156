"""Arithmetic not fused with what reads it: on one CPU device a call of its own, on a mesh as it was."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxtune.models.no_fuse import no_fuse
from jaxtune.parallel import make_mesh


def gradient_of_kernel(x, scale, d_y):
    """A norm's product, read transposed: `[in, out]`."""
    return no_fuse(jnp.multiply)(x, scale).T @ d_y


def compiled(mesh, *arrays):
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, jax.NamedSharding(mesh, P())) for array in arrays]
        program = jax.jit(gradient_of_kernel).lower(*placed).compile()
        return program.as_text(), np.asarray(program(*placed))


def test_one_cpu_device_keeps_the_call_and_a_mesh_does_not():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((64, 16), (16,), (64, 24))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    wanted = (np.asarray(arrays[0], np.float64) * np.asarray(arrays[1])).T @ np.asarray(arrays[2], np.float64)
    sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}
    text, value = compiled(make_mesh(sizes, jax.devices()[:1]), *arrays)
    assert ' call(' in text
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)
    text, value = compiled(make_mesh(sizes | {'data': 8}), *arrays)
    assert ' call(' not in text
    np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_plain_function():
    x, scale = jax.random.normal(jax.random.key(1), (8, 4)), jnp.arange(1.0, 5.0)

    def loss(function, x, scale):
        return jnp.sum(jnp.sin(function(x, scale)))

    ours = jax.jit(jax.grad(lambda x, scale: loss(no_fuse(jnp.multiply), x, scale), (0, 1)))(x, scale)
    plain = jax.grad(lambda x, scale: loss(jnp.multiply, x, scale), (0, 1))(x, scale)
    for got, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
