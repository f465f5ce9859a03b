"""GLM-4.5 and 4.6: half of each head's channels turned, queries and keys normed or not, experts as DeepSeek-V3 has them.

Source of the names: ``Glm4MoeForCausalLM`` of transformers; all but the experts are Llama's and Qwen3's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.deepseek import EXPERT_RULES, read_sigmoid_experts
from megatron_rmipo.families.expert_rules import sparse_rules
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA
from megatron_rmipo.families.norm_places import QK_NORMS
from megatron_rmipo.families.rope import read_partial_rope


def _read(fields: Fields) -> Mapping[str, object]:
    return {**read_partial_rope(fields), "experts": read_sigmoid_experts(fields)}


GLM4_MOE = dataclasses.replace(
    LLAMA,
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    only={field: allowed for field, allowed in COMMON_ONLY.items() if field != "partial_rotary_factor"},
    defaults={
        **LLAMA.defaults,
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "partial_rotary_factor": 0.5},
        **{"first_k_dense_replace": 1, "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    },
    rules=sparse_rules((*LLAMA.rules, *(dataclasses.replace(rule, only_with="qk_norm") for rule in QK_NORMS)), EXPERT_RULES),
    # Layers that predict further tokens are left out, as transformers leaves them out.
    unread=("num_nextn_predict_layers",),
    ignored=(*LLAMA.ignored, r"model\.layers\.(46|92)\..*"),
    switches={"attention_bias": ("qkv_bias",), "use_qk_norm": ("qk_norm",)},
    read=_read,
)
