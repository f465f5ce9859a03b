"""Mixtral: experts in every layer, scores over those a token goes through.

Source of the names: ``MixtralForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core; all but the experts are Mistral's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.expert_fields import read_experts
from megatron_rmipo.families.expert_rules import expert_rules, router_rules, sparse_rules
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA
from megatron_rmipo.families.mistral import read_windows


def _read(fields: Fields) -> Mapping[str, object]:
    experts = read_experts(fields)
    return {"experts": experts, **read_windows(fields)}


MIXTRAL = dataclasses.replace(
    LLAMA,
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    only={**COMMON_ONLY, "layer_types": (None,)},
    defaults={
        **LLAMA.defaults,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_theta": 1000000.0,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    rules=sparse_rules(
        LLAMA.rules,
        (
            *router_rules("block_sparse_moe.gate", joined="mlp.gate"),
            *expert_rules("block_sparse_moe.experts.{expert}", gate="w1", up="w3", down="w2"),
        ),
    ),
    unread=(),
    switches={},
    read=_read,
)
