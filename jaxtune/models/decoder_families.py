"""The decoder families: Hugging Face's config fields to `DecoderConfig`, and where parameters lie in their folders.

A new family is a function and a `Family` here, and a line in `models.FAMILIES`.
"""

from typing import Any

from jaxtune.common.checks import ExpectedError, integer, number
from jaxtune.models import Family
from jaxtune.models.decoder_config import (
    LLAMA_MODULES,
    DecoderConfig,
    attention_bias,
    llama_like,
    partial_rope,
    ropes_by_type,
    whole_rope,
    windows_of,
)
from jaxtune.models.fields import FieldError, Fields

_NORMS_AFTER = (None, 'post_attention_layernorm', None, 'post_feedforward_layernorm')


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


def ministral(fields: Fields) -> DecoderConfig:
    """Ministral 8B: Mistral with windows in some layers."""
    return llama_like(fields, windows=windows_of(fields))


def ministral3(fields: Fields) -> DecoderConfig:
    """Ministral 3 (arXiv:2601.08584): queries grow with their positions."""
    parameters, growth = fields['rope_parameters'], None
    if parameters.get('llama_4_scaling_beta') is not None:
        growth = parameters['llama_4_scaling_beta'], parameters.get('original_max_position_embeddings')
        try:
            growth = number()(growth[0]), integer(1)(growth[1])
        except ExpectedError as error:
            expected = f'llama_4_scaling_beta and original_max_position_embeddings: expected {error}'
            raise FieldError('rope_parameters', expected) from None
    return llama_like(fields, windows=windows_of({**fields, 'layer_types': None}), query_growth=growth)


def smollm3(fields: Fields) -> DecoderConfig:
    """SmolLM 3 (Hugging Face 2025): Llama, with layers that have no positions (Yang et al. 2025, arXiv:2501.18795)."""
    layers, turns = fields['num_hidden_layers'], fields['no_rope_layers']
    if not isinstance(turns, list) or len(turns) < layers or not all(turn in (0, 1) for turn in turns):
        raise FieldError('no_rope_layers', f'expected {layers} numbers, each 0 or 1')
    rope = whole_rope(fields)
    return llama_like(
        fields,
        windows=windows_of(fields),
        ropes=tuple(rope if turn else None for turn in turns[:layers]),
        mlp_bias=bool(fields['mlp_bias']),
        **attention_bias(fields),
    )


def granite_like(fields: Fields, **differences: Any) -> DecoderConfig:
    """Llama with factors on embeddings, scores, the residual and the logits; `differences` as for `llama_like`."""
    return llama_like(
        fields,
        input_scale=fields['embedding_multiplier'],
        attention_scale=fields['attention_multiplier'],
        residual_scale=fields['residual_multiplier'],
        logit_scale=1 / fields['logits_scaling'],
        **attention_bias(fields),
        **differences,
    )


def granite(fields: Fields) -> DecoderConfig:
    """Granite 3 (IBM 2024)."""
    return granite_like(fields, mlp_bias=bool(fields['mlp_bias']))


def gemma(fields: Fields) -> DecoderConfig:
    """Gemma 1 (arXiv:2403.08295)."""
    _refuse_bidirectional(fields)
    return llama_like(fields, norm_offset=1.0, embed_scale=fields['hidden_size'] ** 0.5, **attention_bias(fields))


def gemma2(fields: Fields, **differences: Any) -> DecoderConfig:
    """Gemma 2 (arXiv:2408.00118)."""
    _refuse_bidirectional(fields)
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
        **differences,
    )


def gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3 (arXiv:2503.19786): queries and keys are normed; local and global layers have their own rotary bases."""
    windows_of(fields)  # says what is wrong with `layer_types`
    fields = {**fields, 'attn_logit_softcapping': None}  # `transformers` has the field, and does not apply it
    return gemma2(fields, qk_norm='head', ropes=ropes_by_type(fields))


def _refuse_bidirectional(fields: Fields) -> None:
    if fields.get('use_bidirectional_attention'):
        raise FieldError('use_bidirectional_attention', 'expected False: this model is trained as a decoder')


def glm4(fields: Fields) -> DecoderConfig:
    """GLM-4-0414 (arXiv:2406.12793): a part of each head turns, in pairs side by side; four norms a layer."""
    return llama_like(
        fields,
        rope=partial_rope(fields),
        rope_interleaved=True,
        norm_names=(
            'input_layernorm',
            'post_self_attn_layernorm',
            'post_attention_layernorm',
            'post_mlp_layernorm',
        ),
        fused_gate_up=True,
        qkv_bias=bool(fields['attention_bias']),
    )


def cohere2(fields: Fields) -> DecoderConfig:
    """Command R7B and Command A (arXiv:2504.00698): parallel layers; those without a window have no positions."""
    rope, windows = whole_rope(fields), windows_of(fields)
    return llama_like(
        {**fields, 'rms_norm_eps': fields['layer_norm_eps']},
        windows=windows,
        ropes=tuple(None if window is None else rope for window in windows),
        rope_interleaved=True,
        norm='layer',
        norm_bias=False,
        norm_names=('input_layernorm', None, None, None),
        parallel=True,
        logit_scale=fields['logit_scale'],
        **attention_bias(fields),
    )


def starcoder2(fields: Fields) -> DecoderConfig:
    """StarCoder 2 (arXiv:2402.19173): GPT-2's norms and feed-forward layer. Its dropout is not applied."""
    return llama_like(
        {**fields, 'rms_norm_eps': fields['norm_epsilon']},
        windows=windows_of({**fields, 'layer_types': None}),
        norm='layer',
        gated=False,
        **dict.fromkeys(('qkv_bias', 'o_bias', 'mlp_bias'), bool(fields['use_bias'])),
    )


def phi3(fields: Fields) -> DecoderConfig:
    """Phi 3 and 4 (arXiv:2404.14219): fused kernels; some turn only part of a head."""
    return llama_like(
        fields,
        windows=windows_of(fields),
        rope=partial_rope(fields),
        fused_qkv=True,
        fused_gate_up=True,
    )


def olmo2(fields: Fields) -> DecoderConfig:
    """OLMo 2 (arXiv:2501.00656): norms after the layers instead of before, queries and keys normed over all heads."""
    return llama_like(fields, norm_names=_NORMS_AFTER, qk_norm='all', **attention_bias(fields))


def olmo3(fields: Fields) -> DecoderConfig:
    """OLMo 3 (arXiv:2512.13961): OLMo 2 with windows; only layers without one have scaled frequencies."""
    return llama_like(
        fields,
        windows=windows_of(fields),
        ropes=ropes_by_type(fields),
        norm_names=_NORMS_AFTER,
        qk_norm='all',
        **attention_bias(fields),
    )


def exaone4(fields: Fields) -> DecoderConfig:
    """EXAONE 4 (arXiv:2507.11407): norms after the layers; where some have a window, the others have no positions."""
    windows, rope = windows_of(fields), whole_rope(fields)
    hybrid = fields['sliding_window'] is not None
    return llama_like(
        fields,
        windows=windows,
        ropes=tuple(None if hybrid and window is None else rope for window in windows),
        norm_names=_NORMS_AFTER,
        qk_norm='head',
    )


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
        ropes=(),
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

_STARCODER2_MODULES = LLAMA_MODULES | {
    'layers/mlp/up_proj': 'model.layers.{}.mlp.c_fc',
    'layers/mlp/down_proj': 'model.layers.{}.mlp.c_proj',
}

LLAMA = Family('llama', 'decoder', llama, 'LlamaForCausalLM', LLAMA_MODULES)
MISTRAL = Family('mistral', 'decoder', mistral, 'MistralForCausalLM', LLAMA_MODULES)
QWEN2 = Family('qwen2', 'decoder', qwen2, 'Qwen2ForCausalLM', LLAMA_MODULES)
QWEN3 = Family('qwen3', 'decoder', qwen3, 'Qwen3ForCausalLM', LLAMA_MODULES)
MINISTRAL = Family('ministral', 'decoder', ministral, 'MinistralForCausalLM', LLAMA_MODULES)
MINISTRAL3 = Family('ministral3', 'decoder', ministral3, 'Ministral3ForCausalLM', LLAMA_MODULES)
SMOLLM3 = Family('smollm3', 'decoder', smollm3, 'SmolLM3ForCausalLM', LLAMA_MODULES)
GRANITE = Family('granite', 'decoder', granite, 'GraniteForCausalLM', LLAMA_MODULES)
GEMMA = Family('gemma', 'decoder', gemma, 'GemmaForCausalLM', LLAMA_MODULES)
GEMMA2 = Family('gemma2', 'decoder', gemma2, 'Gemma2ForCausalLM', LLAMA_MODULES)
GEMMA3 = Family(
    'gemma3_text',
    'decoder',
    gemma3,
    'Gemma3ForCausalLM',
    LLAMA_MODULES,
    classes={'reward': 'Gemma3TextForSequenceClassification'},
)
GLM4 = Family('glm4', 'decoder', glm4, 'Glm4ForCausalLM', LLAMA_MODULES)
COHERE2 = Family('cohere2', 'decoder', cohere2, 'Cohere2ForCausalLM', LLAMA_MODULES)
STARCODER2 = Family('starcoder2', 'decoder', starcoder2, 'Starcoder2ForCausalLM', _STARCODER2_MODULES)
PHI3 = Family('phi3', 'decoder', phi3, 'Phi3ForCausalLM', LLAMA_MODULES)
OLMO2 = Family('olmo2', 'decoder', olmo2, 'Olmo2ForCausalLM', LLAMA_MODULES)
OLMO3 = Family('olmo3', 'decoder', olmo3, 'Olmo3ForCausalLM', LLAMA_MODULES)
EXAONE4 = Family('exaone4', 'decoder', exaone4, 'Exaone4ForCausalLM', LLAMA_MODULES)
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
