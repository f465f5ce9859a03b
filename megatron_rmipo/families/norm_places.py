"""The norms of a layer by where they stand, for families whose norms stand elsewhere than Llama's."""

from __future__ import annotations

from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.llama import HF_LAYER, LLAMA, MEGATRON_LAYER

LLAMA_WITHOUT_LAYER_NORMS = tuple(rule for rule in LLAMA.rules if not rule.megatron.endswith("layer_norm_weight"))

# Queries and keys, normed head by head.
QK_NORMS = (
    Rule(MEGATRON_LAYER + "self_attention.q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), Layout.HEAD),
    Rule(MEGATRON_LAYER + "self_attention.k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), Layout.HEAD),
)
# Over all heads together.
WHOLE_QK_NORMS = (
    Rule(MEGATRON_LAYER + "self_attention.q_layernorm.weight", (HF_LAYER + "self_attn.q_norm.weight",), Layout.QUERIES),
    Rule(MEGATRON_LAYER + "self_attention.k_layernorm.weight", (HF_LAYER + "self_attn.k_norm.weight",), Layout.KEYS),
)


def norms_before(attention: str, mlp: str) -> tuple[Rule, ...]:
    """Norms of what attention and MLP take, by their Hugging Face names in a layer."""
    return (
        Rule(MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_weight", (f"{HF_LAYER}{attention}.weight",), Layout.WHOLE),
        Rule(MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight", (f"{HF_LAYER}{mlp}.weight",), Layout.WHOLE),
    )


def norms_after(attention: str, mlp: str) -> tuple[Rule, ...]:
    """Norms of what attention and MLP give, by their Hugging Face names in a layer."""
    return (
        Rule(
            MEGATRON_LAYER + "self_attention.linear_proj.post_layernorm.weight", (f"{HF_LAYER}{attention}.weight",), Layout.WHOLE
        ),
        Rule(MEGATRON_LAYER + "mlp.linear_fc2.post_layernorm.weight", (f"{HF_LAYER}{mlp}.weight",), Layout.WHOLE),
    )
