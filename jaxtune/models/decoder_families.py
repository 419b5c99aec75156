"""The decoder families: Hugging Face's config fields to `DecoderConfig`, and where parameters lie in their folders.

A new family is a function and a `Family` here, and a line in `models.FAMILIES`.
"""

from jaxtune.models import Family
from jaxtune.models.decoder_config import (
    LLAMA_MODULES,
    DecoderConfig,
    attention_bias,
    llama_like,
    rope_of,
    windows_of,
)
from jaxtune.models.fields import FieldError, Fields


def llama(fields: Fields) -> DecoderConfig:
    """Llama 2, 3 and 3.1 (arXiv:2307.09288, arXiv:2407.21783)."""
    return llama_like(fields, mlp_bias=bool(fields['mlp_bias']), **attention_bias(fields))


def mistral(fields: Fields) -> DecoderConfig:
    """Mistral 7B (arXiv:2310.06825): Llama with a sliding window."""
    return llama_like(fields, windows=windows_of({**fields, 'layer_types': None}))


def qwen2(fields: Fields) -> DecoderConfig:
    """Qwen 2 and 2.5 (arXiv:2407.10671): biases on queries, keys and values."""
    return llama_like(fields, windows=windows_of(fields), qkv_bias=True)


def qwen3(fields: Fields) -> DecoderConfig:
    """Qwen 3 (arXiv:2505.09388): queries and keys are normed head by head."""
    return llama_like(fields, windows=windows_of(fields), qk_norm='head', **attention_bias(fields))


def gemma2(fields: Fields) -> DecoderConfig:
    """Gemma 2 (arXiv:2408.00118)."""
    if fields.get('use_bidirectional_attention'):
        raise FieldError('use_bidirectional_attention', 'expected False: this model is trained as a decoder')
    return llama_like(
        {**fields, 'hidden_act': fields['hidden_activation']},
        windows=windows_of(fields),
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
        **attention_bias(fields),
    )


def phi3(fields: Fields) -> DecoderConfig:
    """Phi 3 and 4 (arXiv:2404.14219): fused kernels; some turn only part of a head."""
    head_dim = fields.get('head_dim') or fields['hidden_size'] // fields['num_attention_heads']
    rotary_dim = int(head_dim * fields['rope_parameters'].get('partial_rotary_factor', 1.0))
    return llama_like(
        fields,
        windows=windows_of(fields),
        rope=rope_of(fields, rotary_dim),
        fused_qkv=True,
        fused_gate_up=True,
    )


def olmo2(fields: Fields) -> DecoderConfig:
    """OLMo 2 (arXiv:2501.00656): norms after the layers instead of before, queries and keys normed over all heads."""
    names = (None, 'post_attention_layernorm', None, 'post_feedforward_layernorm')
    return llama_like(fields, norm_names=names, qk_norm='all', **attention_bias(fields))


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
