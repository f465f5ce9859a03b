"""OLMoE: experts in every layer, and queries and keys normed over all heads together.

Source of the names: ``OlmoeForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.expert_fields import read_experts
from megatron_rmipo.families.expert_rules import expert_rules, router_rules, sparse_rules
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import ATTENTION_BIAS, COMMON_ONLY, LLAMA
from megatron_rmipo.families.norm_places import WHOLE_QK_NORMS


def _read(fields: Fields) -> Mapping[str, object]:
    experts = read_experts(fields, normalized=fields.flag("norm_topk_prob"))
    return {"experts": experts}


OLMOE = dataclasses.replace(
    LLAMA,
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    only={**COMMON_ONLY, "clip_qkv": (None,)},
    defaults={
        **LLAMA.defaults,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.01,
    },
    rules=sparse_rules((*LLAMA.rules, *WHOLE_QK_NORMS), (*router_rules("mlp.gate"), *expert_rules("mlp.experts.{expert}"))),
    unread=(),
    switches=ATTENTION_BIAS,
    always=("qk_norm_whole",),
    read=_read,
)
