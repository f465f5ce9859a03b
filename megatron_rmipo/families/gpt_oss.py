"""gpt-oss: experts with biases in every layer, attention with sinks, a sliding window in every other layer.

Source of the names: ``GptOssForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core; all but experts and
sinks are Llama's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.architecture import Experts
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.expert_rules import router_rules, sparse_rules, stacked_expert_rules
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layers import FULL, SLIDING, read_layer_kinds
from megatron_rmipo.families.llama import ATTENTION_BIAS, COMMON_ONLY, HF_LAYER, LLAMA, MEGATRON_LAYER

# What transformers assumes of a config that says nothing of rotary embeddings.
_ROPE: Mapping[str, object] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(fields: Fields) -> Mapping[str, object]:
    # Published configs say it twice; transformers reads the second.
    again = fields.get("experts_per_token")
    if again is not None and again != fields.count("num_experts_per_tok"):
        raise fields.error("experts_per_token", f"is {again!r}, but num_experts_per_tok {fields.count('num_experts_per_tok')}")
    experts = Experts(
        num_experts=fields.count("num_local_experts"),
        per_token=fields.count("num_experts_per_tok"),
        ffn_hidden_size=fields.count("intermediate_size"),
        router_bias=True,
        bias=True,
        aux_loss_coeff=fields.nonnegative("router_aux_loss_coef"),
    )
    default = [FULL if layer % 2 else SLIDING for layer in range(fields.count("num_hidden_layers"))]
    return {
        "experts": experts,
        "layer_kinds": read_layer_kinds(fields, default),
        "activation": "clamped_swiglu",
        "activation_limit": fields.number("swiglu_limit"),
    }


GPT_OSS = dataclasses.replace(
    LLAMA,
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    only={**COMMON_ONLY, "swiglu_alpha": (1.702,)},
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_parameters": _ROPE,
        "sliding_window": 128,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
    },
    rules=sparse_rules(
        (
            *LLAMA.rules,
            Rule(MEGATRON_LAYER + "self_attention.core_attention.softmax_offset", (HF_LAYER + "self_attn.sinks",), Layout.HEADS),
        ),
        (*router_rules("mlp.router"), *stacked_expert_rules("mlp.experts")),
    ),
    unread=("initial_context_length",),
    switches=ATTENTION_BIAS,
    always=("attention_sinks",),
    read=_read,
)
