"""The decoder: one module for every family, their differences in `DecoderConfig`.

Layers are scanned: parameters are stacked on a leading axis and one block is compiled, however many there are.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.models import Family, kv_cache
from jaxtune.models import rope as rotary
from jaxtune.models.attention import KernelLog, attention
from jaxtune.models.decoder_config import IGNORED, DecoderConfig, Run, decoder_config
from jaxtune.models.latent import project_latent
from jaxtune.models.layers import ACTIVATIONS, LayerNorm, Part, RMSNorm, bottleneck, normal, parameter
from jaxtune.models.model import Flops, Head, Model, Outputs, Tensor, Tie, layer_of, leaf_paths, virtual_tokens
from jaxtune.models.moe import MoE
from jaxtune.models.prompts import places_before, prefix_of, prepend, put_before, without_prompt
from jaxtune.models.remat import layer_input, named, recomputed
from jaxtune.models.routing import Routing
from jaxtune.parallel import constrain, fusion_barrier

_NO_WINDOW = 2**30  # beyond every position

Cache = kv_cache.Cache | None


class Context(NamedTuple):
    """What all layers share.

    Attributes:
      q_positions: `[batch, length]` int32.
      q_segment_ids: `[batch, length]` int32.
      k_positions: `[batch, keys]` int32.
      k_segment_ids: `[batch, keys]` int32.
      angles: the rotary `(cos, sin)` of all layers (`rope.layer_angles`), or None.
      prompt: a trained prompt `[virtual, d_model]` that all segments see, or None.
    """

    q_positions: jax.Array
    q_segment_ids: jax.Array
    k_positions: jax.Array
    k_segment_ids: jax.Array
    angles: rotary.Angles | None
    prompt: jax.Array | None = None


class Layer(NamedTuple):
    """What differs between layers beside parameters: the number from 0, the window, and its place in the cache."""

    number: jax.Array
    window: jax.Array
    cached: jax.Array


class _Part(Part):
    """What every part of a decoder is told."""

    config: DecoderConfig

    def norm(self, name: str | None) -> Callable[[jax.Array], jax.Array]:
        if name is None:
            return lambda x: x
        if self.config.norm == 'layer':
            return LayerNorm(self.config.norm_epsilon, self.config.norm_bias, name=name)
        return RMSNorm(self.config.norm_epsilon, self.config.norm_offset, name=name)


class Attention(_Part):
    """Self-attention `[batch, length, d_model]`, with a cache or without."""

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache, layer: Layer, context: Context) -> tuple[jax.Array, Cache]:
        c = self.config
        q, k, v = project_latent(self, x) if c.latent else self.project(x)
        sinks = parameter(self, 'sinks', normal(c.initializer_range, c.cutoff), (c.num_heads,)) if c.sinks else None
        if c.scale_by_layer:
            q = q / (layer.number + 1).astype(q.dtype)
        if c.query_growth is not None:
            beta, span = c.query_growth
            growth = 1 + beta * jnp.log1p((context.q_positions // span).astype(jnp.float32))
            q = q * growth[..., None, None].astype(q.dtype)
        prefix, angles = prefix_of(self), rotary.of_layer(context.angles, c.ropes, layer.number)
        pairs = angles if c.rope_interleaved else None
        if pairs is not None:
            q, k = (rotary.halves_from_pairs(x, 2 * pairs[0].shape[-1]) for x in (q, k))
        if cache is not None or prefix is not None:
            # A cache keeps its keys turned, a prefix is not turned at all.
            q, k, angles = rotary.rotate(q, angles), rotary.rotate(k, angles), None
            if pairs is not None:  # a prefix has the family's own order
                q, k = (rotary.pairs_from_halves(x, 2 * pairs[0].shape[-1]) for x in (q, k))
        k_positions, k_segment_ids = context.k_positions, context.k_segment_ids
        window = c.windows[0] if len(set(c.windows)) == 1 else layer.window
        if cache is not None:
            cache = _write(cache, k, v, layer, context, prefix)
            k, v = cache['k'][layer.cached].astype(q.dtype), cache['v'][layer.cached].astype(q.dtype)
        elif prefix is not None:
            k, v = put_before(prefix, k, v)
            k_positions, k_segment_ids = places_before(prefix[0].shape[0], k_positions, k_segment_ids)
        if cache is not None and x.shape[1] == 1:
            seen = _seen(context, window)
            y = kv_cache.attend_one(q, k, v, seen, scale=c.attention_scale, softcap=c.attention_softcap, sinks=sinks)
        else:
            if cache is not None:
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            y = attention(
                q,
                k,
                v,
                q_positions=context.q_positions,
                k_positions=k_positions,
                q_segment_ids=context.q_segment_ids,
                k_segment_ids=k_segment_ids,
                scale=c.attention_scale,
                angles=angles,
                softcap=c.attention_softcap,
                window=window,
                sinks=sinks,
                implementation=self.implementation,
                packed=self.packed,
                kernels=self.kernels,
                # A prompt is near every segment of a packed row, which blocks skipped by their place would not know.
                self_attention=cache is None and context.prompt is None and prefix is None,
            )
        y = y[..., : c.value_dim].reshape(*x.shape[:2], c.num_heads * c.value_dim)
        return self.dense('o_proj', c.d_model, c.o_bias, residual=True)(y), cache

    def project(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values `[batch, length, heads, head_dim]`, normed where the family does so."""
        c = self.config
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if c.fused_qkv:
            fused = self.dense('qkv_proj', q_width + 2 * kv_width, c.qkv_bias)(x)
            qkv = jnp.split(fused, (q_width, q_width + kv_width), axis=-1)
        else:
            widths = {'q_proj': q_width, 'k_proj': kv_width, 'v_proj': kv_width}
            qkv = [self.dense(name, width, c.qkv_bias)(x) for name, width in widths.items()]
        if c.qk_norm == 'all':
            qkv[:2] = self.norm('q_norm')(qkv[0]), self.norm('k_norm')(qkv[1])
        if c.qkv_clip is not None:
            qkv = [jnp.clip(y, -c.qkv_clip, c.qkv_clip) for y in qkv]
        qkv = [y.reshape(*y.shape[:2], -1, c.head_dim) for y in qkv]
        if c.qk_norm == 'head':
            qkv[:2] = self.norm('q_norm')(qkv[0]), self.norm('k_norm')(qkv[1])
        return [constrain(y, 'batch', 'length', 'heads', None) for y in qkv]


def _write(
    cache: kv_cache.Cache,
    k: jax.Array,
    v: jax.Array,
    layer: Layer,
    context: Context,
    prefix: tuple[jax.Array, jax.Array] | None,
) -> kv_cache.Cache:
    """Puts keys and values into the slots of their positions, a prefix into the first; those of padding go nowhere."""
    at = jnp.where(context.q_segment_ids != 0, context.q_positions, kv_cache.slots(cache))
    cache = kv_cache.write(cache, layer.cached, {'k': k, 'v': v}, at)
    if prefix is None:
        return cache
    before = jnp.broadcast_to(jnp.arange(len(prefix[0])), (len(k), len(prefix[0])))
    wide = {name: jnp.broadcast_to(part, (len(k), *part.shape)) for name, part in zip('kv', prefix, strict=True)}
    return kv_cache.write(cache, layer.cached, wide, before)


def _seen(context: Context, window: int | jax.Array | None) -> jax.Array:
    """Which slots of the cache the one token of each row sees, bool `[batch, slots]`."""
    distance = context.q_positions - context.k_positions
    seen = (distance >= 0) & (context.q_segment_ids != 0)
    return seen if window is None else seen & (distance < window)


class MLP(_Part):
    """Feed-forward layer, gated (Shazeer 2020, arXiv:2002.05202) or not; `d_ff` wide, 0 = as the config says."""

    d_ff: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, activation, d_ff = self.config, ACTIVATIONS[self.config.activation], self.d_ff or self.config.d_ff
        if c.fused_gate_up:
            (fused,) = fusion_barrier(named('mlp_in', self.dense('gate_up_proj', 2 * d_ff, c.mlp_bias)(x)))
            gate, up = jnp.split(fused, 2, axis=-1)
            y = activation(gate) * up
        elif c.gated:
            both = (named('mlp_in', self.dense(name, d_ff, c.mlp_bias)(x)) for name in ('gate_proj', 'up_proj'))
            gate, up = fusion_barrier(*both)
            y = activation(gate) * up
        else:
            y = activation(named('mlp_in', self.dense('up_proj', d_ff, c.mlp_bias)(x)))
        y = constrain(y, 'batch', 'length', 'mlp')
        return self.dense('down_proj', c.d_model, c.mlp_bias, residual=True)(y)


class Block(_Part):
    """One layer: attention and feed-forward (of experts, if `sparse`), each added to the residual."""

    sparse: bool = False

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache], layer: Layer, context: Context
    ) -> tuple[tuple[jax.Array, Cache], Routing | None]:
        x, cache = layer_input(carry[0]), carry[1]
        before_attention, after_attention, before_mlp, after_mlp = self.config.norm_names
        normed = self.norm(before_attention)(x)
        y, cache = Attention(*self.same(), name='self_attn')(normed, cache, layer, context)
        y = named('attn_proj', y)
        x = x + self.scaled(self.norm(after_attention)(bottleneck(self, 'attention_adapter', y)))
        normed, routing = normed if self.config.parallel else self.norm(before_mlp)(x), None
        if self.sparse:
            y, routing = MoE(*self.same(), shared=MLP, name='mlp')(normed, context.q_segment_ids != 0)
        else:
            y = MLP(*self.same(), name='mlp')(normed)
        y = bottleneck(self, 'mlp_adapter', named('mlp_out', y))
        x = x + self.scaled(self.norm(after_mlp)(y))
        return (constrain(x, 'batch', 'length', None), cache), routing

    def scaled(self, y: jax.Array) -> jax.Array:
        """What is added to the residual."""
        scale = self.config.residual_scale
        return y if scale is None else y * jnp.asarray(scale, y.dtype)


class Decoder(_Part):
    """Tokens `[batch, length]` to hidden states `[batch, length, d_model]` after the final norm."""

    remat: str = 'none'
    head: str = 'lm'

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: Cache = None,
        prompt: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> Outputs:
        c = self.config
        # Looked up as the table lies; from there to whole rows in one exchange (in one go XLA would gather all rows).
        x = constrain(self.embed('embed_tokens', c.vocab_size)(tokens), 'copy', 'length', 'width')
        if c.embed_scale is not None:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        if prompt is not None:
            x, positions, segment_ids = prepend(prompt, x, positions, segment_ids)
        if c.input_scale is not None:
            x = x * jnp.asarray(c.input_scale, x.dtype)
        if not c.ropes:
            x = x + self.embed('embed_positions', c.max_positions)(positions)
        x = constrain(x, 'batch', 'length', None)

        angles = rotary.layer_angles(c.ropes, jnp.where(segment_ids != 0, positions, 0), segment_ids)
        context = Context(positions, segment_ids, positions, segment_ids, angles, prompt)
        if cache is not None:
            slots = jnp.broadcast_to(jnp.arange(kv_cache.slots(cache)), (len(tokens), kv_cache.slots(cache)))
            seen = (segment_ids != 0).astype(segment_ids.dtype)
            context = Context(positions, seen, slots, jnp.ones_like(slots), angles)
        if self.is_initializing():
            x = self._make_layers(x, context)
            routing = None
        elif cache is not None and kv_cache.is_divided(cache):
            x, cache = self._each_layer(x, cache, context)
            routing = None
        else:
            x, cache, routing = self._scan_layers(x, cache, context)
        x = self.norm('norm')(x)
        if prompt is not None:
            x = x[:, prompt.shape[0] :]
        if self.is_initializing() and self.head == 'reward':
            self.dense('score', 1, False, of_head=True)(x)
        elif self.is_initializing() and not c.tied:
            self.dense('lm_head', c.vocab_size, False, of_head=True)(x)
        return Outputs(x, cache, routing)

    def _layers(self, numbers: Sequence[int]) -> Layer:
        """What differs between the layers of these numbers, stacked."""
        windows = [_NO_WINDOW if self.config.windows[i] is None else self.config.windows[i] for i in numbers]
        places = jnp.asarray(numbers, jnp.int32)
        return Layer(places, jnp.asarray(windows, jnp.int32), places)

    def _make_layers(self, x: jax.Array, context: Context) -> jax.Array:
        """Makes the parameters of all layers."""
        for stack in self.config.stacks:
            scanned = nn.scan(
                Block,
                variable_axes={'params': 0},
                split_rngs={'params': True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # Flax says int, and takes a tree
                length=len(stack.numbers),
            )
            block = scanned(*self.same(), sparse=stack.sparse, name=stack.name)
            (x, _), _ = block((x, None), self._layers(stack.numbers), context)
        return x

    def _scan_layers(self, x: jax.Array, cache: Cache, context: Context) -> tuple[jax.Array, Cache, Routing | None]:
        """All layers: a scan over those of one kind that follow one another."""
        routings = []
        keys = jax.random.split(self.make_rng('dropout'), self.config.num_layers) if self.has_rng('dropout') else None
        for run, params in self._runs():
            block = Block(*self.same(), sparse=run.sparse, parent=None)

            def layer(carry: Any, xs: Any, block: Block = block) -> Any:
                own, layer, key = xs
                rngs = None if key is None else {'dropout': key}
                return block.apply({'params': own}, carry, layer, context, rngs=rngs)

            own_keys = None if keys is None else keys[run.numbers[0] : run.numbers[-1] + 1]
            xs = (params, self._layers(run.numbers), own_keys)
            (x, cache), routing = jax.lax.scan(recomputed(layer, self.remat), (x, cache), xs)
            routings += [routing] if run.sparse else []
        if not routings:
            return x, cache, None
        routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings)
        return x, cache, routing._replace(tokens=routing.tokens[0])

    def _each_layer(self, x: jax.Array, cache: kv_cache.Cache, context: Context) -> tuple[jax.Array, kv_cache.Cache]:
        """All layers, one after the other, over a divided cache."""
        places = {number: (run, i) for run in self.config.runs for i, number in enumerate(run.numbers, run.start)}

        def layer(number: int, carry: tuple[jax.Array, kv_cache.Cache]) -> tuple[jax.Array, kv_cache.Cache]:
            run, place = places[number]
            block = Block(*self.same(), sparse=run.sparse, parent=None)
            own = layer_of(self.get_variable('params', run.name), place)
            told = jax.tree.map(lambda leaf: leaf[0], self._layers([number]))._replace(cached=jnp.int32(0))
            return cast(Any, block.apply({'params': own}, carry, told, context))[0]

        return kv_cache.each_layer(layer, x, cache)

    def _runs(self) -> Iterator[tuple[Run, Any]]:
        """Layers of one kind that follow one another, and their parameters."""
        runs = self.config.runs
        parts = {}
        for stack in self.config.stacks:
            sizes = [len(run.numbers) for run in runs if run.sparse is stack.sparse]
            leaves, structure = jax.tree.flatten(self.get_variable('params', stack.name))
            # The gradient of a split is one concatenation, that of slices as many sums of whole stacks.
            pieces = [jax.lax.split(leaf, sizes) if len(sizes) > 1 else [leaf] for leaf in leaves]
            parts[stack.sparse] = iter([jax.tree.unflatten(structure, part) for part in zip(*pieces, strict=True)])
        return ((run, next(parts[run.sparse])) for run in runs)


def _init(module: Decoder, rng: jax.Array) -> Any:
    place = jnp.zeros((1, 1), jnp.int32)
    return module.init(rng, place, place, place + 1)['params']


def _forward(
    module: Decoder,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    cache: Cache = None,
    rng: jax.Array | None = None,
    begins: bool = True,
) -> Outputs:
    tokens = batch['tokens']
    positions, segment_ids = batch.get('positions'), batch.get('segment_ids')
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    rngs = None if rng is None else {'dropout': rng}
    own, prompt = without_prompt(params)
    positions = positions + virtual_tokens(params)
    prompt = prompt if begins else None
    outputs = module.apply(
        {'params': own}, tokens, positions, segment_ids, cache, prompt, batch.get('noise'), rngs=rngs
    )
    return cast(Outputs, outputs)


def _head(config: DecoderConfig, head: str, params: Any) -> Head:
    if head == 'reward':
        return Head(params['score']['kernel'])
    made = {'softcap': config.logit_softcap, 'scale': config.logit_scale}
    if config.tied:
        return Head.of(params['embed_tokens']['embedding'], vocab_major=True, **made)
    return Head.of(params['lm_head']['kernel'], **made)


def _cache(config: DecoderConfig, dtype: jnp.dtype, batch: int, max_length: int) -> kv_cache.Cache:
    return kv_cache.empty(config.num_layers, batch, config.num_kv_heads, max_length, config.head_dim, dtype)


def _flops(config: DecoderConfig, head: str, shapes: Any, length: int) -> Flops:
    products = sum(
        leaf.size * _used(config, path) for path, leaf in leaf_paths(shapes).items() if path.endswith('kernel')
    )
    products += config.vocab_size * config.d_model if config.tied and head == 'lm' else 0
    keys = sum(min(length, window or length) for window in config.windows)
    return Flops(6.0 * products, 6.0 * config.num_heads * (config.head_dim + config.value_dim) * keys)


def _used(config: DecoderConfig, path: str) -> float:
    """Which share of a kernel a token is multiplied by."""
    return config.experts.top_k / config.experts.count if config.experts and '/experts/' in path else 1.0


def _tensors(family: Family, config: DecoderConfig, shapes: Any) -> dict[str, Tensor]:
    modules, tensors = family.module_names(config), {}
    stacks = {stack.name: stack.numbers for stack in config.stacks} if len(config.stacks) > 1 else {}
    for path in leaf_paths(shapes):
        module, leaf = path.rsplit('/', 1)
        module, numbers = module.replace('dense_layers/', 'layers/', 1), stacks.get(path.split('/')[0], ())
        # A parameter that is no module's weight or bias goes by its own path.
        own = modules.get(f'{module}/{leaf}')
        name = own or f'{modules.get(module, module)}.{"bias" if leaf == "bias" else "weight"}'
        transposed = (family.transposed and not own) or module in ('lm_head', 'score')
        tensors[path] = Tensor(name, leaf == 'kernel' and transposed, numbers)
    return tensors


def _tied(tensors: dict[str, Tensor], tie: Tie | None, own_head: bool) -> dict[str, Tensor]:
    """Where a table and a head are found that a folder stores once."""
    if tie:
        return tensors | {tie.table: dataclasses.replace(tensors[tie.table], others=(tie.name,))}
    if own_head:
        others = (tensors['embed_tokens/embedding'].name,)
        return tensors | {'lm_head/kernel': dataclasses.replace(tensors['lm_head/kernel'], others=others)}
    return tensors


def check(fields: Mapping[str, Any], family: Family) -> None:
    """Raises `FieldError` if a field's value is impossible here."""
    decoder_config(fields, family)


def build(
    fields: Mapping[str, Any],
    family: Family,
    *,
    param_dtype: jnp.dtype,
    compute_dtype: jnp.dtype,
    remat: str,
    attention: str,
    matmul: str = '',
    packed: bool = True,
    head: str = 'lm',
    own_head: bool = False,
) -> Model:
    """The model of Hugging Face's config fields.

    Args:
      fields: the config fields.
      family: that of their `model_type`.
      param_dtype: as for `models.build`, and so the next three.
      compute_dtype: of activations.
      remat: activation checkpointing.
      attention: the implementation.
      matmul: as for `models.build`.
      packed: rows may hold several segments.
      head: `lm`, or `reward`: one number a token, which `transformers`' sequence classifiers give for the last one.
      own_head: as for `models.build`.

    Raises:
      FieldError: a field's value is impossible here.
    """
    own_head = own_head and head == 'lm'
    if own_head:
        fields = {**fields, 'tie_word_embeddings': False}
    config = decoder_config(fields, family)
    tie = Tie('embed_tokens/embedding', 'lm_head/kernel', 'lm_head.weight') if config.tied and head == 'lm' else None
    kernels = KernelLog()
    module = Decoder(config, param_dtype, compute_dtype, attention, kernels, matmul, packed, remat, head)
    # One token is enough to make parameters, and too few for the kernels that `flash` insists on.
    init = functools.partial(_init, Decoder(config, param_dtype, compute_dtype, 'xla', head=head))
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Model(
        hf_config=dict(fields),
        architecture=family.head_class(head),
        kind='decoder',
        config=config,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        shapes=shapes,
        init=init,
        forward=functools.partial(_forward, module),
        make_head=functools.partial(_head, config, head),
        make_cache=functools.partial(_cache, config, compute_dtype),
        count_flops=functools.partial(_flops, config, head, shapes),
        tensors=_tied(_tensors(family, config, shapes), tie, own_head),
        base_prefix=family.base_prefix,
        ignored=(*family.ignored, *IGNORED),
        heads=('lm_head', 'score'),
        tie=tie,
        kernels=kernels,
    )
