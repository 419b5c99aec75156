"""Small random mixtures of experts of several families, as `transformers` saves them."""

from jaxtune import models

_SIZES = {
    'vocab_size': 97, 'hidden_size': 32, 'intermediate_size': 24, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 64, 'num_experts_per_tok': 2, 'bos_token_id': 1,
    'eos_token_id': 2, 'pad_token_id': 0, 'tie_word_embeddings': False,
}  # fmt: skip
FAMILIES = {
    'qwen3_moe': {'num_experts': 4, 'moe_intermediate_size': 20, 'head_dim': 8, 'mlp_only_layers': [1]},
    'mixtral': {'num_local_experts': 4},
    'qwen2_moe': {'num_experts': 4, 'moe_intermediate_size': 20, 'shared_expert_intermediate_size': 28},
    'olmoe': {'num_experts': 4},
    'gpt_oss': {'num_local_experts': 4, 'head_dim': 8},
    'granitemoe': {'num_local_experts': 4},
    'deepseek_v3': {
        'n_routed_experts': 4, 'n_group': 2, 'topk_group': 1, 'moe_intermediate_size': 20, 'first_k_dense_replace': 1,
        'q_lora_rank': 20, 'kv_lora_rank': 16, 'qk_rope_head_dim': 6, 'qk_nope_head_dim': 10, 'v_head_dim': 12,
        'num_key_value_heads': 4, 'num_mtp_layers': 0,
    },
}  # fmt: skip


def config(family):
    """Config fields of a family's mixture."""
    return {'model_type': family, **_SIZES, **FAMILIES[family]}


def build(family, **changes):
    """A family's mixture, without parameters."""
    return models.build(models.read_config(config(family) | changes))


def save(folder, family):
    """A folder with random weights, none of them zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop('model_type'), **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'norm' not in name:
                parameter.normal_(0, 0.3 if name.endswith(('gate.weight', 'router.weight')) else 0.15)
    model.save_pretrained(folder)
