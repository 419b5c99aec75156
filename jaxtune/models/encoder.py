"""The encoder: one module for every family, their differences in `EncoderConfig`.

Every token sees its whole segment. Layers are scanned: parameters are stacked on a leading axis and one block is
compiled, however many there are.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.models import Family, kv_cache
from jaxtune.models import rope as rotary
from jaxtune.models.attention import KernelLog, attention
from jaxtune.models.encoder_families import HEADS, IGNORED, EncoderConfig, encoder_config
from jaxtune.models.layers import ACTIVATIONS, Dense, LayerNorm, Part, bottleneck, parameter
from jaxtune.models.model import Flops, Head, Model, Outputs, Tensor, Tie, leaf_paths
from jaxtune.models.prompts import places_before, prefix_of, prepend, put_before, without_prompt
from jaxtune.models.remat import layer_input, named, rematerialised
from jaxtune.parallel import constrain

_NO_WINDOW = 2**30  # beyond every position


class Context(NamedTuple):
    """What all layers share: where tokens are, and the rotary angles `(cos, sin)` of global and of local layers."""

    positions: jax.Array
    segment_ids: jax.Array
    angles: rotary.Angles | None
    local_angles: rotary.Angles | None


class _Part(Part):
    """What every part of an encoder is told."""

    config: EncoderConfig

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.config.norm_epsilon, self.config.norm_bias, name=name)


class Attention(_Part):
    """Self-attention within segments, to both sides, `[batch, length, d_model]`."""

    @nn.compact
    def __call__(self, x: jax.Array, window: jax.Array, context: Context) -> jax.Array:
        c = self.config
        width = c.num_heads * c.head_dim
        if c.fused_qkv:
            qkv = jnp.split(self.dense('qkv_proj', 3 * width, c.linear_bias)(x), 3, axis=-1)
        else:
            qkv = [self.dense(name, width, c.linear_bias)(x) for name in ('q_proj', 'k_proj', 'v_proj')]
        qkv = [y.reshape(*y.shape[:2], c.num_heads, c.head_dim) for y in qkv]
        q, k, v = (constrain(y, 'batch', 'length', 'heads', None) for y in qkv)
        prefix, angles = prefix_of(self), None
        if context.angles is not None:
            assert context.local_angles is not None  # a model has both or neither
            local = window < _NO_WINDOW
            cos, sin = (jnp.where(local, *pair) for pair in zip(context.local_angles, context.angles, strict=True))
            angles = (cos, sin)
        k_positions, k_segment_ids = context.positions, context.segment_ids
        if prefix is not None:  # which is not turned
            q, k, angles = rotary.rotate(q, angles), rotary.rotate(k, angles), None
            k, v = put_before(prefix, k, v)
            k_positions, k_segment_ids = places_before(prefix[0].shape[0], k_positions, k_segment_ids)
        y = attention(
            q,
            k,
            v,
            q_positions=context.positions,
            k_positions=k_positions,
            q_segment_ids=context.segment_ids,
            k_segment_ids=k_segment_ids,
            scale=c.head_dim**-0.5,
            angles=angles,
            window=c.windows[0] if len(set(c.windows)) == 1 else window,
            implementation=self.implementation,
            packed=self.packed,
            kernels=self.kernels,
            self_attention=prefix is None,
            causal=False,
        )
        return self.dense('o_proj', c.d_model, c.linear_bias, residual=True)(y.reshape(*x.shape[:2], width))


class MLP(_Part):
    """Feed-forward layer, gated or not."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        if c.gated:
            fused = named('mlp_in', self.dense('gate_up_proj', 2 * c.d_ff, c.mlp_bias)(x))
            gate, up = jnp.split(fused, 2, axis=-1)
            y = activation(gate) * up
        else:
            y = activation(named('mlp_in', self.dense('up_proj', c.d_ff, c.mlp_bias)(x)))
        y = constrain(y, 'batch', 'length', 'mlp')
        return self.dense('down_proj', c.d_model, c.mlp_bias, residual=True)(y)


class Block(_Part):
    """One layer: attention and feed-forward, each added to the residual, with norms before or after."""

    first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, window: jax.Array, context: Context) -> tuple[jax.Array, None]:
        self_attn, mlp = Attention(*self.same(), name='self_attn'), MLP(*self.same(), name='mlp')
        x = layer_input(x)

        def attention(x: jax.Array) -> jax.Array:
            return bottleneck(self, 'attention_adapter', named('attn_proj', self_attn(x, window, context)))

        def feed_forward(x: jax.Array) -> jax.Array:
            return bottleneck(self, 'mlp_adapter', named('mlp_out', mlp(x)))

        if self.config.pre_norm:
            x = x + attention(x if self.first else self.norm('attention_norm')(x))
            x = x + feed_forward(self.norm('mlp_norm')(x))
        else:
            x = self.norm('attention_norm')(x + attention(x))
            x = self.norm('mlp_norm')(x + feed_forward(x))
        return constrain(x, 'batch', 'length', None), None


class LMHead(_Part):
    """The masked language model's head up to its last norm; the logits' own parameters are only made here."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = ACTIVATIONS[c.lm_activation](
            self.dense('transform', c.d_model, c.head_bias, residual=True, of_head=True)(x)
        )
        x = self.norm('norm')(x)
        if self.is_initializing():
            if c.decoder_bias:
                parameter(self, 'bias', nn.initializers.zeros, (c.vocab_size,))
            if not c.tied:
                self.dense('decoder', c.vocab_size, False, residual=True, of_head=True)(x)
        return x


class Pooler(_Part):
    """The dense layer before a classifier."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = ACTIVATIONS[c.pooler_activation](
            self.dense('dense', c.d_model, c.head_bias, residual=True, of_head=True)(x)
        )
        return self.norm('norm')(x) if c.pooler_norm else x


class Encoder(_Part):
    """Tokens `[batch, length]` to what the head's last projection takes.

    `[batch, length, d_model]` for `lm` and `token_classification`, `[batch, 1, d_model]` for `classification`.
    Where norms come before, the first layer has none and stands outside the stack, as `first_layer`.
    """

    remat: str = 'none'
    head: str = 'lm'
    labels: int = 0

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        types: jax.Array,
        prompt: jax.Array | None = None,
    ) -> jax.Array:
        c = self.config
        # Looked up as the table lies; from there to whole rows in one exchange (in one go XLA would gather all rows).
        x = constrain(self.embed('embed_tokens', c.vocab_size)(tokens), 'copy', 'length', 'width')
        count = 0 if prompt is None else prompt.shape[0]
        if prompt is not None:
            x, positions, segment_ids = prepend(prompt, x, positions + count, segment_ids, segment=1)
            types = jnp.pad(types, ((0, 0), (count, 0)))
        if c.rope is None:
            x = x + self.embed('embed_positions', c.max_positions + c.position_offset)(positions + c.position_offset)
        if c.token_types:
            x = x + self.embed('embed_types', c.token_types)(jnp.minimum(types, c.token_types - 1))
        x = self.norm('embed_norm')(constrain(x, 'batch', 'length', None))

        places = jnp.where(segment_ids > 0, positions, 0)
        angles = [None if rope is None else rotary.angles(rope, places) for rope in (c.rope, c.local_rope)]
        context = Context(positions, segment_ids, *angles)
        windows = jnp.asarray([_NO_WINDOW if window is None else window for window in c.windows], jnp.int32)
        first = int(c.pre_norm)
        if first:
            block = rematerialised(Block, self.remat, scanned=False)
            x, _ = block(*self.same(), first=True, name='first_layer')(x, windows[0], context)
        if c.num_layers > first:
            scanned = nn.scan(
                rematerialised(Block, self.remat),
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # Flax says int, and takes a tree
                length=c.num_layers - first,
            )
            x, _ = scanned(*self.same(), name='layers')(x, windows[first:], context)
        if c.pre_norm:
            x = self.norm('norm')(x)
        return self.to_head(x[:, count:], segment_ids[:, count:])

    def to_head(self, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """What the last projection reads: `[batch, length, d_model]`, or of rows `[batch, 1, d_model]`."""
        c = self.config
        if self.head == 'lm':
            return LMHead(*self.same(), name='lm_head')(x)
        if self.head == 'classification':
            x = pool(x, segment_ids, c.pooling)[:, None]
        if self.head == 'classification' or c.token_pooler:
            x = Pooler(*self.same(), name='pooler')(x)
        if self.is_initializing():
            Dense(self.labels, True, c.classifier_range, self.param_dtype, c.cutoff, name='classifier')(x)
        return x


def pool(x: jax.Array, segment_ids: jax.Array, kind: str) -> jax.Array:
    """One vector a row.

    Args:
      x: `[batch, length, d_model]`.
      segment_ids: `[batch, length]`, 0 = padding.
      kind: `cls`, the first token, or `mean`, of all tokens.

    Returns:
      `[batch, d_model]`.
    """
    seen = segment_ids > 0
    if kind == 'cls':
        seen = seen & (jnp.cumsum(seen, axis=1) == 1)
    weights = seen / jnp.maximum(seen.sum(1, keepdims=True), 1)
    # A sum of products, not a matrix product: those round their inputs on some accelerators.
    return (x.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)


def _init(module: Encoder, rng: jax.Array) -> Any:
    place = jnp.zeros((1, 1), jnp.int32)
    return module.init(rng, place, place, place + 1, place)['params']


def _forward(
    module: Encoder,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    cache: kv_cache.Cache | None = None,
    rng: jax.Array | None = None,
    begins: bool = True,
) -> Outputs:
    tokens = batch['tokens']
    positions, segment_ids, types = (batch.get(name) for name in ('positions', 'segment_ids', 'token_types'))
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    if types is None:
        types = jnp.zeros_like(tokens)
    rngs = None if rng is None else {'dropout': rng}
    own, prompt = without_prompt(params)
    hidden = module.apply({'params': own}, tokens, positions, segment_ids, types, prompt, rngs=rngs)
    return Outputs(cast(jax.Array, hidden))


def _head(config: EncoderConfig, head: str, params: Any) -> Head:
    if head != 'lm':
        return Head.of(params['classifier']['kernel'], bias=params['classifier']['bias'])
    bias = params['lm_head'].get('bias')
    if config.tied:
        return Head.of(params['embed_tokens']['embedding'], bias=bias, vocab_major=True)
    return Head.of(params['lm_head']['decoder']['kernel'], bias=bias)


def _no_cache(model_type: str, batch: int, max_length: int) -> NoReturn:
    raise UserError(f'model.config.model_type={model_type!r}: an encoder cannot write text; expected a decoder')


def _flops(config: EncoderConfig, head: str, shapes: Any, length: int) -> Flops:
    products = sum(leaf.size for path, leaf in leaf_paths(shapes).items() if path.endswith('kernel'))
    products += config.vocab_size * config.d_model if head == 'lm' and config.tied else 0
    keys = sum(min(length, 2 * window - 1 if window else length) for window in config.windows)
    return Flops(6.0 * products, 12.0 * config.num_heads * config.head_dim * keys)


def _module(family: Family, config: EncoderConfig, canonical: str, head: str) -> str:
    """The module in a folder of a canonical one."""
    names = family.module_names(config)
    if canonical == 'classifier':
        return names.get('sequence_classifier', 'classifier') if head == 'classification' else 'classifier'
    # The layer that stands outside the stack (see `Encoder`) is layer 0.
    if canonical.startswith('first_layer/'):
        return names[canonical.replace('first_layer/', 'layers/', 1)].format(0)
    return names[canonical]


def _tensors(
    family: Family, config: EncoderConfig, head: str, shapes: Any, tie: Tie | None, own_head: bool
) -> dict[str, Tensor]:
    tensors = {}
    for path in leaf_paths(shapes):
        module, leaf = path.rsplit('/', 1)
        if module == 'lm_head' and not config.tied:
            module = 'lm_head/decoder'
        name = f'{_module(family, config, module, head)}.{"bias" if leaf == "bias" else "weight"}'
        numbers = tuple(range(1, config.num_layers)) if config.pre_norm and path.startswith('layers/') else ()
        others: tuple[str, ...] = ()
        if 'LayerNorm' in name:  # as TensorFlow named them
            others = (name.removesuffix('weight').removesuffix('bias') + ('beta' if leaf == 'bias' else 'gamma'),)
        elif tie and path == tie.table:  # a folder may store what is tied under either name
            others = (tie.name,)
        elif own_head and path == 'lm_head/decoder/kernel':
            others = (f'{_module(family, config, "embed_tokens", head)}.weight',)
        elif path == 'lm_head/bias':
            others = tuple(f'{_module(family, config, part, head)}.bias' for part in ('lm_head', 'lm_head/decoder'))
        tensors[path] = Tensor(name, leaf == 'kernel' and family.transposed, numbers, others)
    return tensors


def check(fields: Mapping[str, Any], family: Family) -> None:
    """Raises `FieldError` if a field's value is impossible here."""
    encoder_config(fields, family)


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
    labels: int = 0,
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
      head: `lm`, `classification` (of rows) or `token_classification`.
      labels: number of classes.
      own_head: as for `models.build`.

    Raises:
      FieldError: a field's value is impossible here.
    """
    if head not in HEADS or (head != 'lm' and labels < 1):
        raise ValueError(f'expected a head of {HEADS}, with at least one label, not {head!r} with {labels}')
    own_head = own_head and head == 'lm'
    if own_head:
        fields = {**fields, 'tie_word_embeddings': False}
    config = encoder_config(fields, family)
    name = f'{_module(family, config, "lm_head/decoder", head)}.weight'
    tie = Tie('embed_tokens/embedding', 'lm_head/decoder/kernel', name) if config.tied and head == 'lm' else None
    kernels = KernelLog()
    module = Encoder(config, param_dtype, compute_dtype, attention, kernels, matmul, packed, remat, head, labels)
    # One token is enough to make parameters, and too few for the kernels that `flash` insists on.
    init = functools.partial(_init, Encoder(config, param_dtype, compute_dtype, 'xla', head=head, labels=labels))
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Model(
        hf_config=dict(fields),
        architecture=family.head_class(head),
        kind='encoder',
        config=config,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        shapes=shapes,
        init=init,
        forward=functools.partial(_forward, module),
        make_head=functools.partial(_head, config, head),
        make_cache=functools.partial(_no_cache, family.model_type),
        count_flops=functools.partial(_flops, config, head, shapes),
        tensors=_tensors(family, config, head, shapes, tie, own_head),
        base_prefix=family.base_prefix,
        ignored=(*family.ignored, *IGNORED),
        heads=('lm_head', 'pooler', 'classifier'),
        tie=tie,
        kernels=kernels,
    )
