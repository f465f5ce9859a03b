"""GLM-4 of 2024: neighbouring channels of a half of each head are turned, gate and up are one matrix.

Source of the names: ``GlmForCausalLM`` of transformers; all but the joined matrix are Llama's.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.families.base import Layout
from megatron_rmipo.families.llama import COMMON_ONLY, HF_LAYER, LLAMA
from megatron_rmipo.families.rope import read_partial_rope

GLM = dataclasses.replace(
    LLAMA,
    name="glm",
    architectures=("GlmForCausalLM",),
    only={field: allowed for field, allowed in COMMON_ONLY.items() if field != "partial_rotary_factor"},
    defaults={
        **LLAMA.defaults,
        **{"rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128},
        **{"partial_rotary_factor": 0.5, "attention_bias": True},
    },
    rules=tuple(
        dataclasses.replace(rule, sources=(HF_LAYER + "mlp.gate_up_proj.weight",)) if rule.layout is Layout.GATE_UP else rule
        for rule in LLAMA.rules
        if rule.only_with != "mlp_bias"
    ),
    unread=(),
    switches={"attention_bias": ("qkv_bias",)},
    always=("rotary_interleaved",),
    read=read_partial_rope,
)
