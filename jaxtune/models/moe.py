"""A mixture of experts in a decoder's layer: each token goes to the few experts that its router chooses, none is lost.

On a mesh every device works on its own tokens. Where experts are divided (`mesh.expert`), tokens are gathered over that
axis, each device runs its experts on those that chose them, and sums are scattered back.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtune.models.attention import KernelLog
from jaxtune.models.decoder_config import DecoderConfig
from jaxtune.models.dispatch import dispatch
from jaxtune.models.experts import run_experts
from jaxtune.models.layers import Part, dropout_key, normal, parameter
from jaxtune.models.routing import Experts, Routing, measured, route
from jaxtune.parallel import BATCH_AXES, auto_axes, dividing_axes
from jaxtune.weights import Weight, dot


class _Kernels(nn.Module):
    """Parameters of one linear layer of all experts: `kernel [experts, in, out]`, maybe `bias [experts, out]`."""

    shape: tuple[int, int, int]
    use_bias: bool
    stddev: float
    param_dtype: jnp.dtype
    cutoff: float | None

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        leaves = {'kernel': parameter(self, 'kernel', normal(self.stddev, self.cutoff), self.shape, self.param_dtype)}
        if self.use_bias:
            leaves['bias'] = parameter(self, 'bias', nn.initializers.zeros, (self.shape[0], self.shape[2]))
        return leaves


class _Experts(Part):
    """The layers of all experts, each as `_Kernels`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Any]]:
        c, e = self.config, _experts(self.config)
        widths = {'gate_up_proj': 2 * e.d_ff} if e.fused else {'gate_proj': e.d_ff, 'up_proj': e.d_ff}

        def kernels(name: str, inputs: int, outputs: int, scale: float = 1.0) -> dict[str, Any]:
            shape = (e.count, inputs, outputs)
            return _Kernels(shape, e.bias, c.initializer_range * scale, self.param_dtype, c.cutoff, name=name)()

        layers = {name: kernels(name, c.d_model, width) for name, width in widths.items()}
        return layers | {'down_proj': kernels('down_proj', e.d_ff, c.d_model, c.residual_init_scale)}


class _Router(Part):
    """Float32 logits `[..., experts]`, and what is added to them only to choose (`[experts]`, or None)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        c, e = self.config, _experts(self.config)
        init = normal(c.initializer_range, c.cutoff)
        kernel = parameter(self, 'kernel', init, (c.d_model, e.count), self.param_dtype)
        logits = dot(x.astype(jnp.float32), kernel, dropout_key(self, kernel))
        if e.router_bias:
            logits = logits + parameter(self, 'bias', init, (e.count,)).astype(jnp.float32)
        if not e.corrected:
            return logits, None
        return logits, parameter(self, 'correction', nn.initializers.zeros, (e.count,))


class MoE(Part):
    """`[batch, length, d_model]` to the same, and where the tokens went; `seen` is False for padding."""

    config: DecoderConfig
    shared: type[nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, seen: jax.Array) -> tuple[jax.Array, Routing]:
        c, e = self.config, _experts(self.config)
        if self.kernels is not None and self.matmul:
            self.kernels.add_product(jnp.dtype(self.dtype).name, 'experts: their products are not in eight bits')
        logits, correction = _Router(*self.same(), name='router')(x)
        layers = _Experts(*self.same(), name='experts')()
        kernels = [leaves['kernel'] for leaves in layers.values()]
        rng = next((key for key in (dropout_key(self, kernel) for kernel in kernels) if key is not None), None)
        run = functools.partial(_run, experts=e, activation=c.activation, log=self.kernels)
        y, chosen = _Division(x.shape, e.count).run(run, x, logits, seen, correction, layers, rng)
        if e.shared_d_ff:
            assert self.shared is not None  # the decoder's feed-forward layer
            always = self.shared(*self.same(), d_ff=e.shared_d_ff, name='shared_expert')(x)
            if e.shared_gate:
                always = jax.nn.sigmoid(self.dense('shared_expert_gate', 1, False, of_head=True)(x)) * always
            y = y + always
        return y, measured(logits, chosen, seen, e)


def _experts(config: DecoderConfig) -> Experts:
    assert config.experts is not None  # or there would be no mixture
    return config.experts


def _run(
    x: jax.Array,
    logits: jax.Array,
    seen: jax.Array,
    correction: jax.Array | None,
    layers: dict[str, dict[str, Any]],
    rng: jax.Array | None,
    *,
    experts: Experts,
    activation: str,
    log: KernelLog | None = None,
    axes: tuple[str, ...] = (),
    gathered: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """One device's tokens, and the experts that they chose.

    Args:
      x: `[batch, length, d_model]`.
      logits: `[batch, length, experts]`.
      seen: bool `[batch, length]`.
      correction: `[experts]`, or None.
      layers: the parameters of this device's experts.
      rng: key for dropout in them, or None.
      experts: how tokens are routed.
      activation: of the gates.
      log: is told which product was chosen, or None.
      axes: `('expert',)` where other devices have other experts.
      gathered: those have other tokens as well.
    """
    weights, chosen = route(logits, experts, correction)
    own = layers['down_proj']['kernel'].shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    places = jnp.where(seen[..., None], chosen, experts.count).reshape(len(tokens), -1)
    shares = weights.reshape(len(tokens), -1)
    if gathered:
        tokens, places, shares = (jax.lax.all_gather(a, axes, tiled=True) for a in (tokens, places, shares))
    if axes:
        places = places - jax.lax.axis_index(axes) * own
        places = jnp.where((places >= 0) & (places < own), places, own)
    plan = dispatch(places, own, min(experts.top_k, own))
    if log is not None and plan.groups.words not in log.experts:
        log.experts.append(plan.groups.words)

    y = run_experts(tokens, shares, layers, plan, experts, activation, rng)
    if axes:
        y = jax.lax.psum_scatter(y, axes, tiled=True) if gathered else jax.lax.psum(y, axes)
    return y.reshape(x.shape), chosen


class _Division:
    """How tokens and experts lie on the mesh: rows over the batch's axes, a row's tokens over the others."""

    def __init__(self, shape: tuple[int, ...], experts: int) -> None:
        self.axes = auto_axes()
        without = tuple(axis for axis in BATCH_AXES if axis != 'expert')
        self.batch = dividing_axes(shape[0], BATCH_AXES, without)
        self.length = dividing_axes(shape[1], ('sequence', 'tensor'), ('sequence',), ('tensor',))
        self.expert = dividing_axes(experts, ('expert',))

    def run(self, function: Any, x: jax.Array, *args: Any) -> Any:
        """`function` on each device's part; arguments as for `_run`."""
        if not self.axes:
            return function(x, *args)
        logits, seen, correction, layers, rng = args
        if rng is not None:  # a key of each device's own
            rng = jax.random.key_data(rng)

        def on_device(x: jax.Array, logits: Any, seen: Any, correction: Any, layers: Any, rng: Any) -> Any:
            if rng is not None:
                rng = jax.random.fold_in(jax.random.wrap_key_data(rng), jax.lax.axis_index(self.axes))
            return function(x, logits, seen, correction, layers, rng, axes=self.expert, gathered='expert' in self.batch)

        tokens = P(self.batch or None, self.length or None, None)
        return jax.shard_map(
            on_device,
            in_specs=(tokens, tokens, P(*tokens[:2]), P(), _leaf_specs(layers, self.expert), P()),
            out_specs=(tokens, tokens),
            axis_names=set(self.axes),
            check_vma=False,
        )(x, logits, seen, correction, layers, rng)


def _leaf_specs(layers: Any, axes: tuple[str, ...]) -> Any:
    """Where the parameters of experts lie while they multiply: only the experts are divided."""

    def aligned(spec: P, shape: tuple[int, ...], may_copy: bool = False) -> P:
        return P(*(None,) * (len(shape) - len(spec)), *spec)

    def spec_of(leaf: Any) -> Any:
        if isinstance(leaf, Weight):
            return leaf.specs(P(axes or None, None, None), aligned)
        return P(axes or None)

    return jax.tree.map(spec_of, layers, is_leaf=lambda leaf: isinstance(leaf, Weight))
