"""A model in the words of Megatron-Core's configuration, without Megatron-Core.

The names are those of TransformerConfig's fields, and of MLATransformerConfig's for latent attention. They hold for whoever
builds the model, this package and Megatron-LM alike; what that lacks (soft caps, norms after a sublayer, several ropes ...) is
not here.
"""

from __future__ import annotations

from typing import Any

from megatron_rmipo.families.architecture import Experts, LatentAttention, ModelArchitecture


def megatron_fields(arch: ModelArchitecture) -> dict[str, Any]:
    """What Megatron-Core's configuration says of a model but for its experts and latents; plain values."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "softmax_scale": arch.attention_scale,
        "layernorm_epsilon": arch.layernorm_epsilon,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": arch.zero_centered_norm,
        "activation_func_clamp_value": arch.activation_limit,
        "glu_linear_offset": float(arch.activation == "clamped_swiglu"),
        "add_bias_linear": arch.mlp_bias,
        "add_qkv_bias": arch.qkv_bias,
        # Not of latents, whose norms' gradients are whole on every rank: Megatron would sum them.
        "qk_layernorm": arch.qk_norm,
        "rotary_interleaved": arch.rotary_interleaved,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def expert_fields(arch: ModelArchitecture, experts: Experts) -> dict[str, Any]:
    """What it says of a model's experts."""
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # Layers that are all alike are numbered by checkpoints in one tensor.
        "moe_layer_freq": [int(arch.has("expert_layers", layer)) for layer in range(arch.num_layers)] if arch.dense_layers else 1,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_topk": experts.per_token,
        "moe_router_score_function": experts.score_function,
        # Softmax over the chosen sums to one, over all it does not; sigmoids are always made to.
        "moe_router_pre_softmax": experts.score_function == "softmax" and not experts.normalized,
        "moe_router_topk_scaling_factor": experts.scaling if experts.scaling != 1.0 else None,
        "moe_router_num_groups": experts.num_groups,
        "moe_router_group_topk": experts.groups_per_token,
        "moe_router_enable_expert_bias": experts.score_bias,
        # Megatron's own would be a loss of each micro-batch.
        "moe_router_load_balancing_type": "none",
    }


def latent_fields(latent: LatentAttention) -> dict[str, Any]:
    """What it says of latent attention."""
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "rope",
        # Of what is turned apart; Megatron's latent attention pairs neighbours as it is.
        "rotary_interleaved": False,
    }
