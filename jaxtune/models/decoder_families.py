"""The decoder families: Hugging Face's config fields to `DecoderConfig`, and where parameters lie in their folders.

A new family is a function and a `Family` here, and a line in `models.FAMILIES`.
"""

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


def _rope_of(fields: Fields, rotary_dim: int) -> Rope:
    try:
        return make_rope(fields['rope_parameters'], rotary_dim, fields['max_position_embeddings'])
    except ValueError as error:
        raise FieldError('rope_parameters', str(error)) from None


def _windows(fields: Fields) -> tuple[int | None, ...]:
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
        values['rope'] = _rope_of(fields, head_dim)
    return DecoderConfig(**values)


def _attention_bias(fields: Fields) -> dict[str, bool]:
    return dict.fromkeys(('qkv_bias', 'o_bias'), bool(fields['attention_bias']))


def llama(fields: Fields) -> DecoderConfig:
    """Llama 2, 3 and 3.1 (arXiv:2307.09288, arXiv:2407.21783)."""
    return llama_like(fields, mlp_bias=bool(fields['mlp_bias']), **_attention_bias(fields))


def mistral(fields: Fields) -> DecoderConfig:
    """Mistral 7B (arXiv:2310.06825): Llama with a sliding window."""
    return llama_like(fields, windows=_windows({**fields, 'layer_types': None}))


def qwen2(fields: Fields) -> DecoderConfig:
    """Qwen 2 and 2.5 (arXiv:2407.10671): biases on queries, keys and values."""
    return llama_like(fields, windows=_windows(fields), qkv_bias=True)


def qwen3(fields: Fields) -> DecoderConfig:
    """Qwen 3 (arXiv:2505.09388): queries and keys are normed head by head."""
    return llama_like(fields, windows=_windows(fields), qk_norm='head', **_attention_bias(fields))


def gemma2(fields: Fields) -> DecoderConfig:
    """Gemma 2 (arXiv:2408.00118)."""
    if fields.get('use_bidirectional_attention'):
        raise FieldError('use_bidirectional_attention', 'expected False: this model is trained as a decoder')
    return llama_like(
        {**fields, 'hidden_act': fields['hidden_activation']},
        windows=_windows(fields),
        norm_offset=1.0,
        norm_names=(
            'input_layernorm',
            'post_attention_layernorm',
            'pre_feedforward_layernorm',
            'post_feedforward_layernorm',
        ),
        embed_scale=fields['hidden_size'] ** 0.5,
        attention_scale=fields['query_pre_attn_scalar'] ** -0.5,
        attention_softcap=fields['attn_logit_softcapping'],
        logit_softcap=fields['final_logit_softcapping'],
        **_attention_bias(fields),
    )


def phi3(fields: Fields) -> DecoderConfig:
    """Phi 3 and 4 (arXiv:2404.14219): fused kernels; some turn only part of a head."""
    head_dim = fields.get('head_dim') or fields['hidden_size'] // fields['num_attention_heads']
    rotary_dim = int(head_dim * fields['rope_parameters'].get('partial_rotary_factor', 1.0))
    return llama_like(
        fields,
        windows=_windows(fields),
        rope=_rope_of(fields, rotary_dim),
        fused_qkv=True,
        fused_gate_up=True,
    )


def olmo2(fields: Fields) -> DecoderConfig:
    """OLMo 2 (arXiv:2501.00656): norms after the layers instead of before, queries and keys normed over all heads."""
    names = (None, 'post_attention_layernorm', None, 'post_feedforward_layernorm')
    return llama_like(fields, norm_names=names, qk_norm='all', **_attention_bias(fields))


def gpt2(fields: Fields) -> DecoderConfig:
    """GPT-2 (Radford et al. 2019). Its dropout is not applied."""
    if fields.get('add_cross_attention'):
        raise FieldError('add_cross_attention', 'expected False: this model is trained as a decoder')
    d_model, heads, layers = fields['n_embd'], fields['n_head'], fields['n_layer']
    return DecoderConfig(
        vocab_size=fields['vocab_size'],
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=fields['n_inner'] or 4 * d_model,
        max_positions=fields['n_positions'],
        windows=(None,) * layers,
        rope=None,
        tied=bool(fields['tie_word_embeddings']),
        activation=fields['activation_function'],
        norm='layer',
        norm_epsilon=fields['layer_norm_epsilon'],
        initializer_range=fields['initializer_range'],
        residual_init_scale=(2 * layers) ** -0.5,
        attention_scale=(d_model // heads) ** -0.5 if fields['scale_attn_weights'] else 1.0,
        scale_by_layer=bool(fields['scale_attn_by_inverse_layer_idx']),
        gated=False,
        fused_qkv=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


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

_GPT2_MODULES = {
    'embed_tokens': 'transformer.wte',
    'embed_positions': 'transformer.wpe',
    'layers/input_layernorm': 'transformer.h.{}.ln_1',
    'layers/self_attn/qkv_proj': 'transformer.h.{}.attn.c_attn',
    'layers/self_attn/o_proj': 'transformer.h.{}.attn.c_proj',
    'layers/post_attention_layernorm': 'transformer.h.{}.ln_2',
    'layers/mlp/up_proj': 'transformer.h.{}.mlp.c_fc',
    'layers/mlp/down_proj': 'transformer.h.{}.mlp.c_proj',
    'norm': 'transformer.ln_f',
    'lm_head': 'lm_head',
}

LLAMA = Family('llama', 'decoder', llama, 'LlamaForCausalLM', LLAMA_MODULES)
MISTRAL = Family('mistral', 'decoder', mistral, 'MistralForCausalLM', LLAMA_MODULES)
QWEN2 = Family('qwen2', 'decoder', qwen2, 'Qwen2ForCausalLM', LLAMA_MODULES)
QWEN3 = Family('qwen3', 'decoder', qwen3, 'Qwen3ForCausalLM', LLAMA_MODULES)
GEMMA2 = Family('gemma2', 'decoder', gemma2, 'Gemma2ForCausalLM', LLAMA_MODULES)
PHI3 = Family('phi3', 'decoder', phi3, 'Phi3ForCausalLM', LLAMA_MODULES)
OLMO2 = Family('olmo2', 'decoder', olmo2, 'Olmo2ForCausalLM', LLAMA_MODULES)
GPT2 = Family(
    'gpt2',
    'decoder',
    gpt2,
    'GPT2LMHeadModel',
    _GPT2_MODULES,
    base_prefix='transformer.',
    transposed=False,
    ignored=(r'\.attn\.(bias|masked_bias)$',),
)


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
