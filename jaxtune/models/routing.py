"""Which experts a token goes to, how balanced that is, and what makes it so.

Shazeer et al. 2017, arXiv:1701.06538; the auxiliary loss of Fedus et al. 2021, arXiv:2101.03961, as `transformers`
computes it; the z-loss of Zoph et al. 2022, arXiv:2202.08906; groups, and the bias that is moved without a loss, of
DeepSeek-V3, arXiv:2412.19437.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# How logits become weights: a softmax over all experts, one over those that were chosen, or each by itself.
SCORES = ('softmax', 'top_softmax', 'sigmoid')


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixtures of experts of a decoder, normalised over families.

    Attributes:
      count: experts of a layer.
      top_k: how many of them a token goes to.
      d_ff: width of an expert.
      sparse: which layers have experts, the others have one feed-forward layer.
      scores: one of `SCORES`.
      normalised: a token's weights are divided by their sum (plus `epsilon`); then all are multiplied by `scale`.
      groups: of experts, of which a token chooses `top_groups` first, by their two best.
      corrected: a bias, which no gradient moves, is added to what experts are chosen by.
      router_bias, bias: the router's logits have biases, the experts' layers have some.
      fused: one kernel makes gates and the rest, as `halves` or `interleaved`; None = two kernels.
      clamp: `(alpha, limit)` of gpt-oss's gate, or None.
      shared_d_ff: width of an expert that every token goes to, 0 = none; `shared_gate` weighs what it gives.
      aux_loss: what `transformers` multiplies the auxiliary loss by where the config asks for it, else 0.
    """

    count: int
    top_k: int
    d_ff: int
    sparse: tuple[bool, ...]
    scores: str = 'softmax'
    normalised: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    corrected: bool = False
    router_bias: bool = False
    bias: bool = False
    fused: str | None = None
    clamp: tuple[float, float] | None = None
    shared_d_ff: int = 0
    shared_gate: bool = False
    aux_loss: float = 0.0


class Routing(NamedTuple):
    """Where the tokens of a batch went; padding does not count.

    Attributes:
      counts: float32 `[layers, experts]`, tokens that went to each.
      chances: float32 `[layers, experts]`, sums over tokens of what the router gave each, of which a token's are 1.
      squares: float32 `[layers]`, sums over tokens of the squared log of the logits' summed exponentials.
      tokens: float32 `[]`, how many there are.
    """

    counts: jax.Array
    chances: jax.Array
    squares: jax.Array
    tokens: jax.Array


def route(logits: jax.Array, experts: Experts, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`(weights, chosen)`, each `[..., top_k]`, of float32 logits `[..., experts]`.

    Args:
      logits: the router's.
      experts: how to choose.
      correction: `[experts]`, or None.
    """
    if experts.scores == 'top_softmax':
        best, chosen = lax.top_k(logits, experts.top_k)
        return jax.nn.softmax(best, axis=-1) * experts.scale, chosen
    scores = jax.nn.sigmoid(logits) if experts.scores == 'sigmoid' else jax.nn.softmax(logits, axis=-1)
    ranks = lax.stop_gradient(scores)
    if correction is not None:
        ranks = ranks + lax.stop_gradient(correction)
    if experts.groups > 1:
        ranks = jnp.where(_in_best_groups(ranks, experts), ranks, -jnp.inf)
    chosen = lax.top_k(ranks, experts.top_k)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalised:
        weights = weights / (weights.sum(-1, keepdims=True) + experts.epsilon)
    return weights * experts.scale, chosen


def _in_best_groups(ranks: jax.Array, experts: Experts) -> jax.Array:
    """Whether an expert is in one of its token's best groups, bool `[..., experts]`."""
    grouped = ranks.reshape(*ranks.shape[:-1], experts.groups, -1)
    best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), experts.top_groups)[1]
    keep = (best[..., None] == jnp.arange(experts.groups)).any(-2)
    return jnp.repeat(keep, grouped.shape[-1], axis=-1)


def measured(logits: jax.Array, chosen: jax.Array, seen: jax.Array, experts: Experts) -> Routing:
    """The routing of one layer, without its dimension.

    Args:
      logits: float32 `[batch, length, experts]`.
      chosen: int32 `[batch, length, top_k]`.
      seen: bool `[batch, length]`, False where there is padding.
      experts: how they were chosen.
    """
    if experts.scores == 'sigmoid':
        chances = jax.nn.sigmoid(logits)
        chances = chances / (chances.sum(-1, keepdims=True) + 1e-20)
    else:
        chances = jax.nn.softmax(logits, axis=-1)
    weight = seen.astype(jnp.float32)
    hits = (chosen[..., None] == jnp.arange(experts.count)).any(-2)
    return Routing(
        counts=jnp.einsum('blec,bl->e', hits[..., None].astype(jnp.float32), weight),
        chances=jnp.einsum('ble,bl->e', chances, weight),
        squares=jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * weight),
        tokens=weight.sum(),
    )


def balance_loss(routing: Routing) -> jax.Array:
    """The auxiliary loss of all layers together: 1 x `top_k` where experts are chosen evenly, more where not."""
    total = jnp.maximum(routing.tokens * len(routing.counts), 1.0)
    shares, chances = routing.counts.sum(0) / total, routing.chances.sum(0) / total
    return routing.counts.shape[-1] * jnp.sum(lax.stop_gradient(shares) * chances)


def z_loss(routing: Routing) -> jax.Array:
    """The mean over tokens and layers of the squared log-sum-exp of the router's logits."""
    return routing.squares.sum() / jnp.maximum(routing.tokens * len(routing.squares), 1.0)


def balance(counts: jax.Array) -> dict[str, jax.Array]:
    """What the log tells of `[layers, experts]` counts.

    `busiest_expert`: its share of the tokens over what it would have if all had as many, in the layer where that is
    most; `router_entropy`: of the shares, over that of equal ones, in the layer where that is least.
    """
    shares = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-30)), 0.0), axis=-1)
    size = counts.shape[-1]
    return {'busiest_expert': shares.max() * size, 'router_entropy': (entropy / jnp.log(size)).min()}


def moved_correction(correction: jax.Array, counts: jax.Array, rate: float) -> jax.Array:
    """The correction `[layers, experts]` after an update: up for experts with fewer tokens than the mean, else down."""
    return correction + rate * jnp.sign(counts.mean(-1, keepdims=True) - counts)
