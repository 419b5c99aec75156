"""A decoder's config, normalised over families, and what families that are like Llama share."""

import dataclasses
from typing import Any

from jaxtune.models import Family
from jaxtune.models.fields import FieldError, Fields
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.rope import Rope, make_rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder, normalised over families.

    Attributes:
      d_ff: width of the feed-forward layer.
      max_positions: the longest row.
      windows: each layer's sliding window in tokens, or None.
      rope: rotary frequencies; None = learned positions.
      norm: `rms` or `layer`; `norm_offset` is added to an RMS norm's stored scale.
      norm_names: the block's norms before attention, after it, before the feed-forward layer, after it; None = none.
      gated: the feed-forward layer is `down(act(gate(x)) * up(x))`, not `down(act(up(x)))`.
      fused_qkv: one kernel makes queries, keys and values, in that order; `fused_gate_up` likewise.
      qk_norm: `head` norms each head's queries and keys (Qwen 3), `all` norms them over all heads (OLMo 2), or None.
      embed_scale: factor on embeddings; None = 1.
      attention_scale: factor on scores; `scale_by_layer` divides it by the layer's number from 1 too.
      attention_softcap, logit_softcap: `cap * tanh(x / cap)`, or None.
      initializer_range: standard deviation, cut off at `cutoff` of them (None = nowhere); `residual_init_scale`
        multiplies it for kernels that write to the residual.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    windows: tuple[int | None, ...]
    rope: Rope | None
    tied: bool
    activation: str
    norm_epsilon: float
    initializer_range: float
    attention_scale: float
    norm: str = 'rms'
    norm_offset: float = 0.0
    norm_names: tuple[str | None, ...] = ('input_layernorm', None, 'post_attention_layernorm', None)
    gated: bool = True
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    embed_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_by_layer: bool = False
    residual_init_scale: float = 1.0
    cutoff: float | None = None


# Heads that a folder may hold and a run may not want, and buffers of older versions.
IGNORED = (r'^(lm_head|score)\.', r'rotary_emb\.inv_freq$')


def rope_of(fields: Fields, rotary_dim: int) -> Rope:
    """Frequencies of the config's `rope_parameters`, for the first `rotary_dim` dimensions of a head."""
    try:
        return make_rope(fields['rope_parameters'], rotary_dim, fields['max_position_embeddings'])
    except ValueError as error:
        raise FieldError('rope_parameters', str(error)) from None


def windows_of(fields: Fields) -> tuple[int | None, ...]:
    """Every layer's window: by `layer_types` where a family has them, else the same everywhere."""
    layers, window = fields['num_hidden_layers'], fields.get('sliding_window')
    kinds = fields.get('layer_types') or ['sliding_attention'] * layers
    known = ('full_attention', 'sliding_attention')
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise FieldError('layer_types', f'expected {layers} names, each {" or ".join(known)}')
    return tuple(window if kind == 'sliding_attention' else None for kind in kinds)


def llama_like(fields: Fields, **differences: Any) -> DecoderConfig:
    """The config of a family that is like Llama but for some differences.

    A field that `transformers` reads in some families only is theirs to name: a folder may hold any, and where the
    family's own class does not know it, it means nothing.

    Args:
      fields: config fields by the names that `LlamaConfig` has.
      differences: fields of `DecoderConfig`.

    Raises:
      FieldError: a field's value is impossible.
    """
    heads = fields['num_attention_heads']
    head_dim = fields.get('head_dim') or fields['hidden_size'] // heads
    values = {
        'vocab_size': fields['vocab_size'],
        'd_model': fields['hidden_size'],
        'num_layers': fields['num_hidden_layers'],
        'num_heads': heads,
        'num_kv_heads': fields['num_key_value_heads'],
        'head_dim': head_dim,
        'd_ff': fields['intermediate_size'],
        'max_positions': fields['max_position_embeddings'],
        'windows': (None,) * fields['num_hidden_layers'],
        'tied': bool(fields['tie_word_embeddings']),
        'activation': fields['hidden_act'],
        'norm_epsilon': fields['rms_norm_eps'],
        'initializer_range': fields['initializer_range'],
        'attention_scale': head_dim**-0.5,
        **differences,
    }
    if 'rope' not in values:
        values['rope'] = rope_of(fields, head_dim)
    return DecoderConfig(**values)


def attention_bias(fields: Fields) -> dict[str, bool]:
    """Biases of all four projections, as the field `attention_bias` says."""
    return dict.fromkeys(('qkv_bias', 'o_bias'), bool(fields['attention_bias']))


LLAMA_MODULES = {'embed_tokens': 'model.embed_tokens', 'norm': 'model.norm', 'lm_head': 'lm_head'} | {
    f'layers/{part}/{name}': f'model.layers.{{}}.{part}.{name}'
    for part, names in {
        'self_attn': ('q_proj', 'k_proj', 'v_proj', 'qkv_proj', 'o_proj', 'q_norm', 'k_norm'),
        'mlp': ('gate_proj', 'up_proj', 'gate_up_proj', 'down_proj'),
    }.items()
    for name in names
} | {
    f'layers/{name}': f'model.layers.{{}}.{name}'
    for name in (
        'input_layernorm',
        'post_attention_layernorm',
        'pre_feedforward_layernorm',
        'post_feedforward_layernorm',
    )
}  # fmt: skip


def decoder_config(fields: Fields, family: Family) -> DecoderConfig:
    """The normalised config of Hugging Face fields.

    Raises:
      FieldError: a field's value is impossible here.
    """
    for width, heads in (('hidden_size', 'num_attention_heads'), ('n_embd', 'n_head')):
        if width in fields and fields[width] < fields[heads]:
            raise FieldError(heads, f'expected at most {width}={fields[width]}')
    config = family.config(fields)
    if config.num_heads % config.num_kv_heads:
        raise FieldError('num_key_value_heads', f'expected a divisor of num_attention_heads={config.num_heads}')
    if config.activation not in ACTIVATIONS:
        name = next(name for name in ('hidden_activation', 'activation_function', 'hidden_act') if name in fields)
        raise FieldError(name, f'expected one of {", ".join(ACTIVATIONS)}')
    if config.rope is not None and config.head_dim % 2:
        raise FieldError('head_dim', f'expected an even number, got {config.head_dim}')
    if any(window is not None and window < 1 for window in config.windows):
        raise FieldError('sliding_window', 'expected at least 1, or None')
    if config.num_layers < 1:
        raise FieldError('num_hidden_layers', 'expected at least 1')
    return config
