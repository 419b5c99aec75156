"""The small modules that every model is made of. Parameters may be arrays or typed leaves (see `jaxtune.weights`)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.models.attention import KernelLog
from jaxtune.models.no_fuse import no_fuse
from jaxtune.parallel import constrain
from jaxtune.weights import Weight, dot, lookup, low_precision

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': partial(jax.nn.gelu, approximate=False),
    'gelu_new': jax.nn.gelu,
    'gelu_pytorch_tanh': jax.nn.gelu,
    'gelu_fast': jax.nn.gelu,
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'relu2': lambda x: jnp.square(jax.nn.relu(x)),
    'sigmoid': jax.nn.sigmoid,
    'silu': jax.nn.silu,
    'swish': jax.nn.silu,
    'tanh': jnp.tanh,
}


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    """A parameter of `module`: what the tree holds under `name`, of whatever kind; initialised where it holds nothing.

    Kernels and embeddings have the model's `param_dtype`. Norms and biases stay float32: they are few, and lie near
    numbers, such as 1, beside which bfloat16 has no room for an update.

    `self.param` alone would refuse a typed leaf, whose inner shapes differ from the initialiser's.
    """
    if module.has_variable('params', name):
        return module.get_variable('params', name)
    return module.param(name, init, shape, dtype)


def dropout_key(module: nn.Module, kernel: jax.Array | Weight) -> jax.Array | None:
    """A key for what a typed leaf drops in training; None for a plain kernel, and where nothing is dropped."""
    if isinstance(kernel, Weight) and module.has_rng('dropout'):
        return module.make_rng('dropout')
    return None


def normal(stddev: float, cutoff: float | None = None) -> Callable:
    """Initialiser: a normal distribution, cut off at `cutoff` standard deviations."""
    if cutoff is None:
        return nn.initializers.normal(stddev)
    return nn.initializers.truncated_normal(stddev, lower=-cutoff, upper=cutoff)


class Dense(nn.Module):
    """Linear layer `[..., in] -> [..., features]`; parameters `kernel [in, features]`, maybe `bias [features]`."""

    features: int
    use_bias: bool
    stddev: float
    param_dtype: jnp.dtype
    cutoff: float | None = None
    kernels: KernelLog | None = None
    matmul: str = ''

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, 'kernel', normal(self.stddev, self.cutoff), shape, self.param_dtype)
        if self.kernels is not None and self.matmul:
            self.kernels.add_product(*low_precision.choice(self.matmul))
        elif self.kernels is not None and isinstance(kernel, Weight):
            self.kernels.add_product(*kernel.product(x))
        y = dot(x, kernel, dropout_key(self, kernel), self.matmul)
        if self.use_bias:
            bias = parameter(self, 'bias', nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype)
        return y


class Embed(nn.Module):
    """Rows of a table for integer ids `[...] -> [..., features]`; parameter `embedding [rows, features]`."""

    rows: int
    features: int
    stddev: float
    param_dtype: jnp.dtype
    dtype: jnp.dtype
    cutoff: float | None = None

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = normal(self.stddev, self.cutoff)
        table = parameter(self, 'embedding', init, (self.rows, self.features), self.param_dtype)
        return lookup(table, ids, self.dtype)


class Part(nn.Module):
    """What every part of a model is told, and the layers that it makes of that.

    Attributes:
      config: the model's, with `d_model`, `initializer_range`, `residual_init_scale` and `cutoff`.
      param_dtype: what kernels and embeddings are kept in.
      dtype: what activations and matrix products use.
      implementation: of attention.
      kernels: is told which one was chosen, and which products; None for a module that only makes parameters.
      matmul: `fp8` or `int8`, what linear layers multiply in; '' = `dtype`.
      packed: rows may hold several segments.
    """

    config: Any
    param_dtype: jnp.dtype
    dtype: jnp.dtype
    implementation: str = 'auto'
    kernels: KernelLog | None = None
    matmul: str = ''
    packed: bool = True

    def dense(self, name: str, features: int, use_bias: bool, residual: bool = False, of_head: bool = False) -> Dense:
        """A linear layer; `residual`: writes to the residual stream; `of_head`: of a head or gate, without `matmul`."""
        c = self.config
        stddev = c.initializer_range * (c.residual_init_scale if residual else 1.0)
        return Dense(
            features,
            use_bias,
            stddev,
            self.param_dtype,
            c.cutoff,
            self.kernels,
            '' if of_head else self.matmul,
            name=name,
        )

    def embed(self, name: str, rows: int) -> Embed:
        """A table of `[rows, d_model]`."""
        c = self.config
        return Embed(rows, c.d_model, c.initializer_range, self.param_dtype, self.dtype, c.cutoff, name=name)

    def same(self) -> tuple:
        """What a part inside this one is told."""
        return self.config, self.param_dtype, self.dtype, self.implementation, self.kernels, self.matmul, self.packed


def bottleneck(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """`x` with what the adapter that the tree holds under `name` adds to it; where it holds none, `x` itself.

    A projection down, a GELU, and a projection up (Houlsby et al. 2019, arXiv:1902.00751).
    """
    if not module.has_variable('params', name):
        return x
    adapter = module.get_variable('params', name)
    down, up = adapter['down'], adapter['up']
    # Said to be whole before and after: left to choose, XLA's partitioner (0.10) counts a layer's output twice.
    x = constrain(x, 'batch', 'length', None)
    y = jax.nn.gelu(dot(x, down['kernel']) + down['bias'].astype(x.dtype))
    return x + constrain(dot(y, up['kernel']), 'batch', 'length', None) + up['bias'].astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension in float32; parameter `scale`, to which `offset` is added.

    Zhang and Sennrich 2019, arXiv:1910.07467; Gemma stores the scale less one (`offset=1`).
    """

    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = parameter(self, 'scale', init, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        shrink = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return no_fuse(_affine)(wide, shrink, scale.astype(jnp.float32) + self.offset).astype(x.dtype)


def _affine(x: jax.Array, shrink: jax.Array, scale: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    x = x * shrink * scale
    return x if bias is None else x + bias


class LayerNorm(nn.Module):
    """Layer norm over the last dimension in float32; parameters `scale` and maybe `bias` (Ba et al. 2016)."""

    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, 'scale', nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        shrink = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        arrays = [centred, shrink, scale.astype(jnp.float32)]
        if self.use_bias:
            bias = parameter(self, 'bias', nn.initializers.zeros, (x.shape[-1],))
            arrays.append(bias.astype(jnp.float32))
        return no_fuse(_affine)(*arrays).astype(x.dtype)
