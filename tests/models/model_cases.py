"""Small random models of every family. A new family joins by a row (or a few) in `CASES`."""

import dataclasses
import functools
import os
import pathlib

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A family with one choice of its options."""

    name: str
    model_type: str
    fields: dict[str, object]
    longest_step: int = 0  # stepwise decoding is compared up to here; 0 = the whole row

    @property
    def config(self) -> dict:
        return {'model_type': self.model_type, **_BASE.get(self.model_type, _LLAMA), **self.fields}


_TOKENS = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
_LLAMA = {
    'vocab_size': 97,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    **_TOKENS,
}
_BASE = {'gpt2': {'vocab_size': 97, 'n_embd': 32, 'n_layer': 3, 'n_head': 4, 'n_positions': 64, **_TOKENS}}


def _rope(kind: str, **parameters) -> dict:
    return {'rope_type': kind, 'rope_theta': 10000.0, **parameters}


def _ministral3(original: int) -> dict:
    scaled = {'factor': 4.0, 'mscale': 1.0, 'mscale_all_dim': 1.0, 'llama_4_scaling_beta': 0.5}
    return _rope('yarn', original_max_position_embeddings=original, **scaled)


def _case(name: str, longest_step: int = 0, **fields) -> Case:
    return Case(name, name.split('-')[0], fields, longest_step)


CASES = (
    _case('llama', num_key_value_heads=4),
    _case('llama-grouped-tied-biased', tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=6),
    _case(
        'llama-3.1',
        rope_parameters=_rope(
            'llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        ),
    ),
    _case('llama-linear', rope_parameters=_rope('linear', factor=2.0)),
    _case('llama-dynamic', rope_parameters=_rope('dynamic', factor=2.0)),
    _case('llama-yarn', rope_parameters=_rope('yarn', factor=4.0, original_max_position_embeddings=16)),
    _case('mistral', sliding_window=5),
    _case('mistral-tied-no-window', sliding_window=None, num_key_value_heads=4, tie_word_embeddings=True),
    _case('qwen2', tie_word_embeddings=True),
    _case('qwen2-some-windows', num_key_value_heads=4, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    _case('qwen3', head_dim=12, tie_word_embeddings=True),
    _case('qwen3-biased', head_dim=8, num_key_value_heads=4, attention_bias=True),
    _case('gemma2', head_dim=12, sliding_window=5, query_pre_attn_scalar=10, attn_logit_softcapping=3.0),
    _case('gemma2-untied', head_dim=8, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=False),
    _case('gemma', head_dim=12),
    _case('gemma-biased-untied', head_dim=8, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False),
    # 3 layers would all be local: the published period is 6.
    _case('gemma3_text', head_dim=12, sliding_window=5, query_pre_attn_scalar=10, num_hidden_layers=6),
    _case(
        'gemma3_text-capped-scaled',
        head_dim=8,
        sliding_window=5,
        attention_bias=True,
        layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        tie_word_embeddings=False,
        rope_parameters={
            'full_attention': _rope('linear', factor=8.0) | {'rope_theta': 1e6},
            'sliding_attention': _rope('default'),
        },
    ),
    _case('phi3', sliding_window=7),
    _case(
        'phi3-long-partial-tied',
        longest_step=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        original_max_position_embeddings=16,
        partial_rotary_factor=0.75,
        rope_parameters=_rope('longrope', short_factor=[1.0, 1.1, 1.3], long_factor=[2.0, 3.0, 4.0]),
    ),
    _case('olmo2'),
    _case('olmo2-tied-biased', num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True),
    _case('mixtral', sliding_window=5, num_local_experts=5),
    _case('qwen2_moe', num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    _case(
        'qwen2_moe-every-other',
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        num_hidden_layers=5,
        norm_topk_prob=True,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    _case(
        'qwen3_moe', num_experts=8, num_experts_per_tok=3, head_dim=12, moe_intermediate_size=24, norm_topk_prob=True
    ),
    _case('qwen3_moe-some-dense', num_experts=8, mlp_only_layers=[1], moe_intermediate_size=24, head_dim=8),
    _case('olmoe', num_experts=8, num_experts_per_tok=3, clip_qkv=1.5),
    _case('granitemoe', num_local_experts=5, num_experts_per_tok=3, residual_multiplier=0.3, logits_scaling=2.0),
    _case('gpt_oss', num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=5, num_hidden_layers=4),
    _case(
        'deepseek_v3',
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=12,
        num_key_value_heads=4,
        num_mtp_layers=0,
    ),
    _case('olmo3', sliding_window=5, num_hidden_layers=4),
    _case(
        'olmo3-yarn',
        sliding_window=5,
        layer_types=['sliding_attention', 'full_attention', 'full_attention'],
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={
            'full_attention': _rope('yarn', factor=4.0, original_max_position_embeddings=16),
            'sliding_attention': _rope('default'),
        },
    ),
    _case(
        'ministral',
        sliding_window=5,
        head_dim=8,
        layer_types=['full_attention', 'sliding_attention', 'sliding_attention'],
    ),
    _case('ministral-all-windows-tied', sliding_window=7, head_dim=12, tie_word_embeddings=True),
    _case('ministral3', head_dim=12, rope_parameters=_ministral3(5)),
    _case(
        'ministral3-window-tied',
        head_dim=8,
        sliding_window=6,
        tie_word_embeddings=True,
        rope_parameters=_ministral3(16),
    ),
    _case('smollm3', num_hidden_layers=4),
    _case(
        'smollm3-windows-biased-untied',
        no_rope_layers=[0, 1, 0],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    _case(
        'granite',
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    _case('granite-biased', attention_bias=True, mlp_bias=True, logits_scaling=0.5, residual_multiplier=0.5),
    _case('glm4', head_dim=12, partial_rotary_factor=0.5),
    _case('glm4-whole-tied', head_dim=8, attention_bias=False, tie_word_embeddings=True, partial_rotary_factor=1.0),
    _case('cohere2', sliding_window=5, num_hidden_layers=4),
    _case(
        'cohere2-biased-untied',
        sliding_window=5,
        layer_types=['full_attention', 'sliding_attention', 'full_attention'],
        attention_bias=True,
        tie_word_embeddings=False,
        logit_scale=0.25,
    ),
    _case('starcoder2', sliding_window=5),
    _case('starcoder2-unbiased-untied', use_bias=False, tie_word_embeddings=False, hidden_act='relu'),
    _case('exaone4', sliding_window=5, num_hidden_layers=4),
    _case('exaone4-no-window-tied', sliding_window=None, layer_types=['full_attention'] * 3, tie_word_embeddings=True),
    _case('llama-proportional', rope_parameters=_rope('proportional', partial_rotary_factor=0.5, factor=2.0)),
    _case('gpt2'),
    _case('gpt2-untied', tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, n_inner=40),
)


@functools.cache
def reference(case: Case, folder: pathlib.Path):
    """`transformers`' model in PyTorch with random weights, saved to `folder` as well."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in case.config.items() if name != 'model_type'}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[case.model_type](**fields), attn_implementation='eager')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # Large enough that every bias, norm and cap shows in the logits.
            parameter.copy_(0.2 * noise + ('norm' in name or 'ln_' in name) * parameter)
    model.eval()
    model.save_pretrained(folder)
    return model
