"""The decoder families with mixtures of experts: config fields to `DecoderConfig`, and where parameters lie."""

from typing import Any

from jaxtune.models import Family
from jaxtune.models.decoder_config import (
    LLAMA_MODULES,
    DecoderConfig,
    Latent,
    attention_bias,
    llama_like,
    rope_of,
    windows_of,
)
from jaxtune.models.decoder_families import granite_like
from jaxtune.models.fields import FieldError, Fields
from jaxtune.models.rope import magnitude
from jaxtune.models.routing import Experts


def experts_of(fields: Fields, **differences: Any) -> Experts:
    """The mixtures of a family.

    Args:
      fields: config fields.
      differences: fields of `Experts`.

    Raises:
      FieldError: a field's value is impossible.
    """
    layers, aux_loss = fields['num_hidden_layers'], fields.get('router_aux_loss_coef')
    name = next(name for name in ('num_local_experts', 'num_experts', 'n_routed_experts') if name in fields)
    if not 1 <= fields['num_experts_per_tok'] <= fields[name]:
        raise FieldError('num_experts_per_tok', f'expected 1 to {name}={fields[name]}')
    values = {
        'count': fields[name],
        'top_k': fields['num_experts_per_tok'],
        'd_ff': fields['intermediate_size'],
        'sparse': (True,) * layers,
        'aux_loss': float(aux_loss or 0.0) if fields.get('output_router_logits') else 0.0,
        **differences,
    }
    return Experts(**values)


def _every_nth(fields: Fields) -> tuple[bool, ...]:
    """Which layers of a Qwen have experts."""
    step, dense, layers = fields['decoder_sparse_step'], fields['mlp_only_layers'] or (), fields['num_hidden_layers']
    if step < 1:
        raise FieldError('decoder_sparse_step', 'expected at least 1')
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    if not any(sparse):
        raise FieldError('mlp_only_layers', 'expected at least one layer with experts')
    return sparse


def mixtral(fields: Fields) -> DecoderConfig:
    """Mixtral (arXiv:2401.04088)."""
    experts = experts_of(fields, normalised=True)
    return llama_like(fields, windows=windows_of({**fields, 'layer_types': None}), experts=experts)


def qwen2_moe(fields: Fields) -> DecoderConfig:
    """Qwen 1.5 MoE and Qwen 2 57B-A14B (arXiv:2407.10671): an expert for every token beside those that are chosen."""
    experts = experts_of(
        fields,
        d_ff=fields['moe_intermediate_size'],
        sparse=_every_nth(fields),
        normalised=bool(fields['norm_topk_prob']),
        shared_d_ff=fields['shared_expert_intermediate_size'],
        shared_gate=True,
    )
    windows = windows_of({**fields, 'sliding_window': fields['sliding_window'] or None})
    return llama_like(fields, windows=windows, qkv_bias=bool(fields['qkv_bias']), experts=experts)


def qwen3_moe(fields: Fields) -> DecoderConfig:
    """Qwen 3 with experts (arXiv:2505.09388)."""
    experts = experts_of(
        fields,
        d_ff=fields['moe_intermediate_size'],
        sparse=_every_nth(fields),
        normalised=bool(fields['norm_topk_prob']),
    )
    windows = windows_of({**fields, 'layer_types': None})
    return llama_like(fields, windows=windows, qk_norm='head', experts=experts, **attention_bias(fields))


def olmoe(fields: Fields) -> DecoderConfig:
    """OLMoE (arXiv:2409.02060): queries and keys are normed over all heads, and may be clipped."""
    experts = experts_of(fields, normalised=bool(fields['norm_topk_prob']))
    clip = fields['clip_qkv']
    return llama_like(
        fields,
        windows=windows_of({**fields, 'layer_types': None}),
        qk_norm='all',
        qkv_clip=clip,
        experts=experts,
        **attention_bias(fields),
    )


def gpt_oss(fields: Fields) -> DecoderConfig:
    """gpt-oss (arXiv:2508.10925): sinks in the softmax of attention, a clamped gate, biases everywhere."""
    experts = experts_of(
        fields,
        scores='top_softmax',
        router_bias=True,
        bias=True,
        fused='interleaved',
        clamp=(float(fields['swiglu_alpha']), float(fields['swiglu_limit'])),
    )
    return llama_like(fields, windows=windows_of(fields), sinks=True, experts=experts, **attention_bias(fields))


def granitemoe(fields: Fields) -> DecoderConfig:
    """Granite 3 with experts (IBM 2024)."""
    return granite_like(fields, experts=experts_of(fields, scores='top_softmax', fused='halves'))


def deepseek_v3(fields: Fields) -> DecoderConfig:
    """DeepSeek-V3 (arXiv:2412.19437): latent attention, groups of experts, a bias that evens them out."""
    layers, dense = fields['num_hidden_layers'], fields['first_k_dense_replace']
    count, groups = fields['n_routed_experts'], fields['n_group'] or 1
    if count % groups or count // groups < 2:
        raise FieldError('n_group', f'expected a divisor of n_routed_experts={count} that leaves two or more in each')
    if not 1 <= (fields['topk_group'] or 1) <= groups:
        raise FieldError('topk_group', f'expected 1 to n_group={groups}')
    if (fields['topk_group'] or 1) * (count // groups) < fields['num_experts_per_tok']:
        raise FieldError('topk_group', 'expected as many experts in the groups as num_experts_per_tok')
    experts = experts_of(
        fields,
        d_ff=fields['moe_intermediate_size'],
        sparse=tuple(i >= dense for i in range(layers)),
        scores='sigmoid',
        normalised=bool(fields['norm_topk_prob']),
        epsilon=1e-20,
        scale=float(fields['routed_scaling_factor']),
        groups=groups,
        top_groups=fields['topk_group'] or 1,
        corrected=True,
        shared_d_ff=fields['moe_intermediate_size'] * fields['n_shared_experts'],
    )
    turned, still, value = fields['qk_rope_head_dim'], fields['qk_nope_head_dim'], fields['v_head_dim']
    if value > still + turned:
        raise FieldError('v_head_dim', f'expected at most qk_nope_head_dim + qk_rope_head_dim = {still + turned}')
    rope = fields['rope_parameters']
    scale = (still + turned) ** -0.5
    if rope.get('rope_type', 'default') != 'default' and rope.get('mscale_all_dim'):
        scale *= magnitude(rope['factor'], rope['mscale_all_dim']) ** 2
    return llama_like(
        fields,
        num_kv_heads=fields['num_attention_heads'],
        head_dim=still + turned,
        attention_scale=scale,
        rope=rope_of(fields, turned),
        latent=Latent(fields['q_lora_rank'], fields['kv_lora_rank'], turned, value),
        rope_interleaved=bool(fields['rope_interleave']),
        experts=experts if any(experts.sparse) else None,
        **attention_bias(fields),
    )


def _with_experts(block: str, router: str, **paths: str) -> dict[str, str]:
    """Where the parameters of a family lie whose experts have a tensor each.

    Args:
      block: the module of the mixture in a layer.
      router: its router.
      paths: names in a folder of `gate_proj`, `up_proj` and `down_proj`, where they are other ones.
    """
    place = f'model.layers.{{}}.{block}'
    names = {name: paths.get(name, name) for name in ('gate_proj', 'up_proj', 'down_proj')}
    return {
        **LLAMA_MODULES,
        'layers/mlp/router': f'{place}.{router}',
        **{f'layers/mlp/experts/{name}': f'{place}.experts.{{}}.{there}' for name, there in names.items()},
    }


_QWEN_MODULES = _with_experts('mlp', 'gate') | {
    f'layers/mlp/{module}': f'model.layers.{{}}.mlp.{module}'
    for module in ('shared_expert_gate', *(f'shared_expert/{name}_proj' for name in ('gate', 'up', 'down')))
}
_QWEN_MODULES = {path: name.replace('shared_expert/', 'shared_expert.') for path, name in _QWEN_MODULES.items()}

_GPT_OSS_MODULES = {
    **LLAMA_MODULES,
    'layers/self_attn/sinks': 'model.layers.{}.self_attn.sinks',
    'layers/mlp/router': 'model.layers.{}.mlp.router',
    **{
        f'layers/mlp/experts/{name}/{leaf}': f'model.layers.{{}}.mlp.experts.{name}{suffix}'
        for name in ('gate_up_proj', 'down_proj')
        for leaf, suffix in (('kernel', ''), ('bias', '_bias'))
    },
}

_GRANITE_MODULES = {
    **LLAMA_MODULES,
    'layers/mlp/router': 'model.layers.{}.block_sparse_moe.router.layer',
    'layers/mlp/experts/gate_up_proj': 'model.layers.{}.block_sparse_moe.input_linear',
    'layers/mlp/experts/down_proj': 'model.layers.{}.block_sparse_moe.output_linear',
}

_DEEPSEEK_MODULES = {
    **_with_experts('mlp', 'gate'),
    'layers/mlp/router/correction': 'model.layers.{}.mlp.gate.e_score_correction_bias',
    **{
        f'layers/mlp/shared_expert/{name}': f'model.layers.{{}}.mlp.shared_experts.{name}'
        for name in ('gate_proj', 'up_proj', 'down_proj')
    },
    **{
        f'layers/self_attn/{name}': f'model.layers.{{}}.self_attn.{name}'
        for name in ('q_a_proj', 'q_a_layernorm', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_a_layernorm', 'kv_b_proj')
    },
}

MIXTRAL = Family(
    'mixtral',
    'decoder',
    mixtral,
    'MixtralForCausalLM',
    _with_experts('block_sparse_moe', 'gate', gate_proj='w1', up_proj='w3', down_proj='w2'),
)
QWEN2_MOE = Family('qwen2_moe', 'decoder', qwen2_moe, 'Qwen2MoeForCausalLM', _QWEN_MODULES)
QWEN3_MOE = Family('qwen3_moe', 'decoder', qwen3_moe, 'Qwen3MoeForCausalLM', _QWEN_MODULES, unlisted=('head_dim',))
OLMOE = Family('olmoe', 'decoder', olmoe, 'OlmoeForCausalLM', _with_experts('mlp', 'gate'))
GPT_OSS = Family('gpt_oss', 'decoder', gpt_oss, 'GptOssForCausalLM', _GPT_OSS_MODULES)
GRANITEMOE = Family('granitemoe', 'decoder', granitemoe, 'GraniteMoeForCausalLM', _GRANITE_MODULES)
DEEPSEEK_V3 = Family(
    'deepseek_v3',
    'decoder',
    deepseek_v3,
    'DeepseekV3ForCausalLM',
    _DEEPSEEK_MODULES,
    ignored=(r'^model\.layers\.\d+\.(embed_tokens|enorm|hnorm|eh_proj|shared_head)\b',),
)
