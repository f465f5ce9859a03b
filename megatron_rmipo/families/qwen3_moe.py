"""Qwen3-MoE: Qwen3 with experts in most layers.

Source of the names: ``Qwen3MoeForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core; all but the experts are Qwen3's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.architecture import LayerKind
from megatron_rmipo.families.expert_fields import read_dense_layers, read_experts
from megatron_rmipo.families.expert_rules import expert_rules, router_rules, sparse_rules
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layers import FULL, has_windows
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA
from megatron_rmipo.families.qwen3 import QWEN3


def _read(fields: Fields) -> Mapping[str, object]:
    experts = read_experts(
        fields,
        "moe_intermediate_size",
        dense_layers=read_dense_layers(fields),
        normalized=fields.flag("norm_topk_prob"),
    )
    # All layers have the window, or none; transformers looks at no other field.
    window = fields.count("sliding_window") if has_windows(fields) else None
    kinds = (LayerKind(window),) * fields.count("num_hidden_layers") if window else ()
    return {"experts": experts, "layer_kinds": kinds}


QWEN3_MOE = dataclasses.replace(
    QWEN3,
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    only={**COMMON_ONLY, "layer_types": (FULL, None)},
    defaults={
        **LLAMA.defaults,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
    },
    rules=sparse_rules(QWEN3.rules, (*router_rules("mlp.gate"), *expert_rules("mlp.experts.{expert}"))),
    unread=("max_window_layers",),
    read=_read,
)
