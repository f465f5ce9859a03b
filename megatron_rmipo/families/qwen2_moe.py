"""Qwen2-MoE and Qwen1.5-MoE: experts in most layers, and one more that every token goes through, weighted by a gate.

Source of the names: ``Qwen2MoeForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core; all but the experts are Qwen2's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.expert_fields import read_dense_layers, read_experts
from megatron_rmipo.families.expert_rules import (
    expert_rules,
    router_rules,
    shared_expert_rules,
    shared_gate_rule,
    sparse_rules,
)
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.qwen2 import QWEN2, read_qwen_windows


def _has_window(layer: int, max_window_layers: int) -> bool:
    """Every other layer of the first ones has a window; Qwen2 has them in the last."""
    return layer % 2 == 0 and layer < max_window_layers


def _read(fields: Fields) -> Mapping[str, object]:
    experts = read_experts(
        fields,
        "moe_intermediate_size",
        dense_layers=read_dense_layers(fields),
        shared_ffn_hidden_size=fields.count("shared_expert_intermediate_size"),
        shared_gate=True,
        normalized=fields.flag("norm_topk_prob"),
    )
    return {"experts": experts, **read_qwen_windows(fields, _has_window)}


QWEN2_MOE = dataclasses.replace(
    QWEN2,
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    defaults={
        **QWEN2.defaults,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
    },
    rules=sparse_rules(
        QWEN2.rules,
        (
            *router_rules("mlp.gate"),
            *expert_rules("mlp.experts.{expert}"),
            *shared_expert_rules("mlp.shared_expert"),
            shared_gate_rule("mlp.shared_expert_gate"),
        ),
    ),
    switches={"qkv_bias": ("qkv_bias",)},
    always=(),
    read=_read,
)
