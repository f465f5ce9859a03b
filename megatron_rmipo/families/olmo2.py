"""OLMo 2: norms stand behind attention and MLP, and queries and keys are normed over all heads together.

Source of the names: ``Olmo2ForCausalLM`` of transformers; Megatron-Bridge for norms behind a linear.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.families.llama import ATTENTION_BIAS, COMMON_ONLY, LLAMA
from megatron_rmipo.families.norm_places import LLAMA_WITHOUT_LAYER_NORMS, WHOLE_QK_NORMS, norms_after

OLMO2 = dataclasses.replace(
    LLAMA,
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    only=COMMON_ONLY,
    defaults={**LLAMA.defaults, "rms_norm_eps": 1e-5},
    rules=(
        *LLAMA_WITHOUT_LAYER_NORMS,
        *norms_after("post_attention_layernorm", "post_feedforward_layernorm"),
        *WHOLE_QK_NORMS,
    ),
    unread=(),
    switches=ATTENTION_BIAS,
    always=("qk_norm_whole", "post_norm"),
    read=lambda fields: {"pre_norm": False},
)
