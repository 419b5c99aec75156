"""The encoder-decoder: T5 and its descendants, their differences in `EncDecConfig`.

Raffel et al. 2020, arXiv:1910.10683: no positions in the embeddings, but a learned bias on the attention scores for
how far apart two tokens are; scores are not divided by the root of `head_dim`, which the initialisation makes up for.
Layers are scanned: parameters are stacked on a leading axis and one block a stack is compiled.

The residual stream and what is added to it are float32 whatever the compute dtype is, the feed-forward layer's last
product among them: in the published models they grow to tens of thousands, where bfloat16 has steps of a hundred and
float16 ends. `transformers` keeps `wo` in float32 for the same reason.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import UserError
from jaxtune.models import Family, kv_cache
from jaxtune.models.attention import KernelLog, visible_softmax
from jaxtune.models.encdec_families import EncDecConfig, encdec_config
from jaxtune.models.layers import ACTIVATIONS, Dense, Embed, RMSNorm, bottleneck, parameter
from jaxtune.models.model import Flops, Head, Model, Outputs, Tensor, Tie, layer_of, leaf_paths
from jaxtune.models.prompts import prefix_of, prepend, put_before, without_prompt
from jaxtune.models.remat import layer_input, named, rematerialised
from jaxtune.parallel import constrain

Cache = kv_cache.Cache | None


def relative_buckets(distances: jax.Array, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """Which learned bias a pair of tokens has: one a distance nearby, one a range of distances further away.

    Args:
      distances: integers, the key's place less the query's.
      bidirectional: later keys have half of the buckets; else they all are in the first one.
      buckets: how many there are.
      max_distance: from here on all distances share the last one.

    Returns:
      int32 of the same shape, in `[0, buckets)`.
    """
    first = jnp.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        first = (distances > 0) * buckets
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    exact = buckets // 2
    far = jnp.log(jnp.maximum(distances, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (far * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return first + jnp.where(distances < exact, distances, far)


def biased_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, visible: jax.Array) -> jax.Array:
    """Attention with a bias added to unscaled scores, all scores at once; the softmax in float32.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k: `[batch, keys, heads, head_dim]`.
      v: like `k`.
      bias: float32 `[batch or 1, heads, length, keys]`, or None.
      visible: bool `[batch or 1, length, keys]`. A query that sees nothing gets 0.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of `q`.
    """
    batch, length, heads, head_dim = q.shape
    chex.assert_shape(k, (batch, None, heads, head_dim), custom_message='k')
    chex.assert_shape(v, k.shape, custom_message='v')
    chex.assert_shape(visible, ({1, batch}, length, k.shape[1]), custom_message='visible')
    if bias is not None:
        chex.assert_shape(bias, ({1, batch}, heads, length, k.shape[1]), custom_message='bias')
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    weights = visible_softmax(scores, visible[:, None])
    return jnp.einsum('bhqk,bkhd->bqhd', weights.astype(v.dtype), v)


class Context(NamedTuple):
    """What all layers of a stack share.

    Attributes:
      buckets: of each pair of a query and a key, `[batch or 1, length, keys]`; None until the stack sets them.
      bias: `[batch or 1, heads, length, keys]`, or None where every layer makes its own.
      visible: `[batch or 1, length, keys]`.
      source: the encoder's states `[batch, source length, d_model]`, or None (an encoder, or read from the cache).
      source_visible: `[batch, length, source length]`, or None.
      slots: where the cache takes the tokens' keys and values, `[batch, length]`, or None.
    """

    buckets: jax.Array | None
    bias: jax.Array | None
    visible: jax.Array
    source: jax.Array | None = None
    source_visible: jax.Array | None = None
    slots: jax.Array | None = None


class _Part(nn.Module):
    """What every part is told."""

    config: EncDecConfig
    param_dtype: jnp.dtype
    dtype: jnp.dtype
    kernels: KernelLog | None = None
    matmul: str = ''

    def dense(self, name: str, features: int, stddev: float, wide: bool = False) -> Dense:
        """A linear layer; `wide`: never by `matmul`."""
        stddev *= self.config.initializer_factor
        matmul = '' if wide else self.matmul
        return Dense(features, False, stddev, self.param_dtype, kernels=self.kernels, matmul=matmul, name=name)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_epsilon, name=name)

    def same(self) -> tuple:
        return self.config, self.param_dtype, self.dtype, self.kernels, self.matmul


class RelativeBias(_Part):
    """Biases of buckets `[batch or 1, length, keys]` as `[batch or 1, heads, length, keys]`, float32."""

    @nn.compact
    def __call__(self, buckets: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.d_model**-0.5 * c.initializer_factor)
        table = parameter(self, 'embedding', init, (c.buckets, c.num_heads))
        # A product instead of a lookup: its gradient adds up in a fixed order, not by scattered additions.
        chosen = jax.nn.one_hot(buckets, c.buckets, dtype=jnp.float32)
        return jnp.einsum('bqkn,nh->bhqk', chosen, table.astype(jnp.float32), precision='highest')


class Attention(_Part):
    """Attention of `x [batch, length, d_model]` to itself or (`cross`) to the encoder's states."""

    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        bias: jax.Array | None,
        visible: jax.Array,
        cache: Cache = None,
        layer: jax.Array | None = None,
        slots: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        c = self.config
        names = ('cross_k', 'cross_v') if self.cross else ('k', 'v')
        q = self.heads('q_proj', x, (c.d_model * c.head_dim) ** -0.5)

        def cached(cache: kv_cache.Cache) -> tuple[jax.Array, ...]:
            return tuple(cache[name][layer].astype(q.dtype) for name in names)

        if source is None:
            assert cache is not None  # it holds what was made of the source
            k, v = cached(cache)
        else:
            k, v = (self.heads(name, source, c.d_model**-0.5) for name in ('k_proj', 'v_proj'))
            if cache is not None:
                assert layer is not None  # whose place in the cache it is
                at = jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]) if slots is None else slots
                cache = kv_cache.write(cache, layer, dict(zip(names, (k, v), strict=True)), at)
                k, v = cached(cache)
        prefix = prefix_of(self)
        if cache is not None and x.shape[1] == 1 and prefix is None:
            y = kv_cache.attend_one(q, k, v, visible[:, 0], bias=None if bias is None else bias[:, :, 0])
        else:
            if cache is not None:
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            if prefix is not None:
                k, v = put_before(prefix, k, v)
                before = ((0, 0), (0, 0), (prefix[0].shape[0], 0))
                bias = None if bias is None else jnp.pad(bias, ((0, 0), *before))
                visible = jnp.pad(visible, before, constant_values=True) & visible.any(-1, keepdims=True)
            q, k, v = (checkpoint_name(x, f'attention_{name}') for x, name in zip((q, k, v), 'qkv', strict=True))
            y = checkpoint_name(biased_attention(q, k, v, bias, visible), 'attention_out')
        width = c.num_heads * c.head_dim
        return self.dense('o_proj', c.d_model, width**-0.5)(y.reshape(*x.shape[:2], width)), cache

    def heads(self, name: str, x: jax.Array, stddev: float) -> jax.Array:
        """A projection of `x` `[batch, length, d_model]` to heads `[batch, length, heads, head_dim]`."""
        c = self.config
        y = self.dense(name, c.num_heads * c.head_dim, stddev)(x)
        return constrain(y.reshape(*x.shape[:2], c.num_heads, c.head_dim), 'batch', 'length', 'heads', None)


class MLP(_Part):
    """Feed-forward layer, gated or not; the last product in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        y = named('mlp_in', self.dense('up_proj', c.d_ff, c.d_model**-0.5)(x))
        gate = named('mlp_in', self.dense('gate_proj', c.d_ff, c.d_model**-0.5)(x)) if c.gated else None
        y = activation(y) if gate is None else activation(gate) * y
        y = constrain(y, 'batch', 'length', 'mlp')
        return self.dense('down_proj', c.d_model, c.d_ff**-0.5, wide=True)(y.astype(jnp.float32))


class Block(_Part):
    """One layer of either stack: attention to itself, to the encoder's states where there are any, feed-forward."""

    decodes: bool = False

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache], layer: jax.Array, context: Context
    ) -> tuple[tuple[jax.Array, Cache], None]:
        x, cache = layer_input(carry[0]), carry[1]
        bias = context.bias
        if bias is None:
            assert context.buckets is not None  # the stack has set them
            bias = RelativeBias(*self.same(), name='relative_bias')(context.buckets)
        normed = self.norm('self_attn_norm')(x).astype(self.dtype)
        attention = Attention(*self.same(), name='self_attn')
        y, cache = attention(normed, normed, bias, context.visible, cache, layer, context.slots)
        x = x + bottleneck(self, 'attention_adapter', named('attn_proj', y))
        if self.decodes:
            normed = self.norm('cross_attn_norm')(x).astype(self.dtype)
            attention = Attention(*self.same(), cross=True, name='cross_attn')
            assert context.source_visible is not None  # a decoder's context has it
            y, cache = attention(normed, context.source, None, context.source_visible, cache, layer)
            x = x + bottleneck(self, 'cross_adapter', named('attn_proj', y))
        y = MLP(*self.same(), name='mlp')(self.norm('mlp_norm')(x).astype(self.dtype))
        x = x + bottleneck(self, 'mlp_adapter', named('mlp_out', y))
        return (constrain(x, 'batch', 'length', None), cache), None


class Stack(_Part):
    """Encoder or decoder: embedded tokens to states after the final norm, `[batch, length, d_model]`."""

    decodes: bool = False
    remat: str = 'none'

    @nn.compact
    def __call__(
        self, x: jax.Array, distances: jax.Array, context: Context, cache: Cache = None
    ) -> tuple[jax.Array, Cache]:
        c = self.config
        buckets = relative_buckets(distances, not self.decodes, c.buckets, c.max_distance)
        bias = None if c.bias_per_layer else RelativeBias(*self.same(), name='relative_bias')(buckets)
        context = context._replace(buckets=buckets, bias=bias)
        if cache is not None and kv_cache.is_divided(cache):
            block = Block(*self.same(), decodes=self.decodes, parent=None)
            params = self.get_variable('params', 'layers')

            def one(i: int, carry: tuple[jax.Array, kv_cache.Cache]) -> tuple[jax.Array, kv_cache.Cache]:
                own = layer_of(params, i)
                return cast(Any, block.apply({'params': own}, carry, jnp.int32(0), context))[0]

            x, cache = kv_cache.each_layer(one, x, cache)
            return self.norm('norm')(x).astype(self.dtype), cache
        layers = c.num_decoder_layers if self.decodes else c.num_layers
        scanned = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # Flax says int, and takes a tree
            length=layers,
        )
        scanned = scanned(*self.same(), decodes=self.decodes, name='layers')
        (x, cache), _ = scanned((x, cache), jnp.arange(layers), context)
        return self.norm('norm')(x).astype(self.dtype), cache


class EncDec(_Part):
    """Source tokens `[batch, source length]` and decoder tokens `[batch, length]` to the decoder's hidden states."""

    remat: str = 'none'

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], cache: Cache = None, prompt: jax.Array | None = None) -> Outputs:
        c = self.config
        if self.kernels is not None:
            self.kernels.add('xla')
        shared = Embed(c.vocab_size, c.d_model, c.initializer_factor, self.param_dtype, jnp.float32, name='shared')

        def embed(tokens: jax.Array) -> jax.Array:
            x = constrain(shared(tokens), 'copy', 'length', 'width')
            return constrain(x, 'batch', 'length', None)

        source, segment_ids = None, None if cache is None else cache.get('source_segment_ids')
        if 'tokens' in batch:
            segment_ids = batch.get('segment_ids', jnp.ones_like(batch['tokens']))
            x = embed(batch['tokens'])
            if prompt is not None:
                x, _, segment_ids = prepend(prompt, x, jnp.zeros_like(segment_ids), segment_ids, segment=1)
            context = Context(None, None, _same_segment(segment_ids, segment_ids))
            encoder = Stack(*self.same(), remat=self.remat, name='encoder')
            source, _ = encoder(x, _distances(segment_ids.shape[1], segment_ids.shape[1]), context)

        assert segment_ids is not None  # without a source in the batch, the cache holds one
        tokens = batch['decoder_tokens']
        length = tokens.shape[1]
        own = batch.get('decoder_segment_ids', jnp.ones_like(tokens))
        if cache is None:
            distances, slots = _distances(length, length), None
            visible = _same_segment(own, own) & (distances <= 0)
            source_visible = _same_segment(own, segment_ids)
        else:
            positions, size = batch['decoder_positions'], kv_cache.slots(cache)
            distances = jnp.arange(size) - positions[..., None]
            visible, slots = distances <= 0, jnp.where(own > 0, positions, size)
            source_visible = jnp.broadcast_to(segment_ids[:, None] > 0, (*tokens.shape, segment_ids.shape[1]))
            if source is not None:
                cache = _with_source(c, cache, segment_ids)
        context = Context(None, None, visible, source, source_visible, slots)
        decoder = Stack(*self.same(), decodes=True, remat=self.remat, name='decoder')
        x, cache = decoder(embed(tokens), distances, context, cache)
        if not c.tied and self.is_initializing():
            # Hugging Face draws it as wide as the embedding, which makes the first logits of a model from scratch
            # differ by tens; this is the width of the published models' own training code.
            self.dense('lm_head', c.vocab_size, c.d_model**-0.5, wide=True)(x)
        return Outputs(x, cache)


def _distances(length: int, keys: int) -> jax.Array:
    """Places of keys less those of queries, `[1, length, keys]`: within a segment also if several share a row."""
    return jnp.arange(keys)[None, None] - jnp.arange(length)[None, :, None]


def _same_segment(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return (queries[:, :, None] == keys[:, None]) & (keys[:, None] > 0)


def _with_source(config: EncDecConfig, cache: kv_cache.Cache, segment_ids: jax.Array) -> kv_cache.Cache:
    """The cache with room for the keys and values that all decoder layers make of the encoder's states, once."""
    cross = kv_cache.empty(
        config.num_decoder_layers,
        len(segment_ids),
        config.num_heads,
        segment_ids.shape[1],
        config.head_dim,
        cache['k'].dtype,
    )
    return {**cache, **{f'cross_{name}': room for name, room in cross.items()}, 'source_segment_ids': segment_ids}


def _init(module: EncDec, rng: jax.Array) -> Any:
    place = jnp.zeros((1, 1), jnp.int32)
    return module.init(rng, {'tokens': place, 'decoder_tokens': place})['params']


def _forward(
    module: EncDec,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    cache: Cache = None,
    rng: jax.Array | None = None,
    begins: bool = True,
) -> Outputs:
    own, prompt = without_prompt(params)
    outputs = module.apply({'params': own}, batch, cache, prompt, rngs=None if rng is None else {'dropout': rng})
    return cast(Outputs, outputs)


def _head(config: EncDecConfig, params: Any) -> Head:
    if config.tied:
        return Head.of(params['shared']['embedding'], scale=config.logit_scale, vocab_major=True)
    return Head.of(params['lm_head']['kernel'], scale=config.logit_scale)


def _cache(config: EncDecConfig, dtype: jnp.dtype, batch: int, max_length: int) -> kv_cache.Cache:
    return kv_cache.empty(config.num_decoder_layers, batch, config.num_heads, max_length, config.head_dim, dtype)


def _flops(config: EncDecConfig, shapes: Any, length: int, target_length: int | None = None) -> Flops:
    """Of a source token, its share in the targets' included: `target_length / length` decoder tokens."""
    targets = length if target_length is None else target_length
    sizes = {path: leaf.size for path, leaf in leaf_paths(shapes).items() if path.endswith('kernel')}
    cross = ('cross_attn/k_proj/kernel', 'cross_attn/v_proj/kernel')
    source = sum(size for path, size in sizes.items() if path.startswith('encoder/') or path.endswith(cross))
    target = sum(sizes.values()) - source
    target += config.vocab_size * config.d_model if config.tied else 0
    width = config.num_heads * config.head_dim
    share = targets / length
    attention = length * config.num_layers + (targets + length) * config.num_decoder_layers * share
    return Flops(6.0 * (source + target * share), 12.0 * width * attention)


def _tensors(family: Family, config: EncDecConfig, shapes: Any) -> dict[str, Tensor]:
    names, tensors = family.module_names(config), {}
    # Tied tensors are stored under one of their names; a head that a folder lacks is tied, as in `transformers`.
    stacks = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
    others = {'shared': (*stacks, *(('lm_head.weight',) if config.tied else ())), 'lm_head': ('shared.weight', *stacks)}
    for path in leaf_paths(shapes):
        module, leaf = path.rsplit('/', 1)
        tensors[path] = Tensor(
            f'{names[module]}.weight', leaf == 'kernel' and family.transposed, others=others.get(module, ())
        )
    return tensors


def check(fields: Mapping[str, Any], family: Family) -> None:
    """Raises `FieldError` if a field's value is impossible here."""
    encdec_config(fields, family)


def build(
    fields: Mapping[str, Any],
    family: Family,
    *,
    param_dtype: jnp.dtype,
    compute_dtype: jnp.dtype,
    remat: str,
    attention: str,
    matmul: str = '',
    own_head: bool = False,
) -> Model:
    """The model of Hugging Face's config fields and their family; arguments as for `models.build`.

    Raises:
      FieldError: a field's value is impossible here.
      UserError: `attention` is `flash`.
    """
    if attention == 'flash':
        raise UserError(
            f'model.attention=flash: {fields["model_type"]} adds a learned bias to its scores, which no kernel here '
            'does; expected model.attention=auto or xla'
        )
    config = encdec_config(fields, family)
    if own_head:
        config = dataclasses.replace(config, tied=False)
    kernels = KernelLog()
    module = EncDec(config, param_dtype, compute_dtype, kernels, matmul, remat)
    init = functools.partial(_init, EncDec(config, param_dtype, compute_dtype))
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Model(
        # Which `transformers` takes as whether logits are scaled; a head is its own where a folder's differs.
        hf_config={**fields, 'tie_word_embeddings': config.logit_scale != 1.0},
        architecture=family.architecture,
        kind='encdec',
        config=config,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        shapes=shapes,
        init=init,
        forward=functools.partial(_forward, module),
        make_head=functools.partial(_head, config),
        make_cache=functools.partial(_cache, config, compute_dtype),
        count_flops=functools.partial(_flops, config, shapes),
        tensors=_tensors(family, config, shapes),
        base_prefix=family.base_prefix,
        ignored=(
            *family.ignored,
            r'^((encoder|decoder)\.embed_tokens|lm_head)\.weight$',
            r'EncDecAttention\.relative_attention_bias\.weight$',
        ),
        heads=('lm_head',),
        tie=Tie('shared/embedding', 'lm_head/kernel', 'lm_head.weight') if config.tied else None,
        kernels=kernels,
    )
