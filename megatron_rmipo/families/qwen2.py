"""Qwen2 and Qwen2.5. Source of the names: ``Qwen2ForCausalLM`` of transformers, which are Llama's; q, k and v have biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA

# Windows are off in all but a few of Qwen's models; where they are, these fields say nothing.
WITHOUT_WINDOWS = ("sliding_window", "max_window_layers")
FULL_ATTENTION_ONLY: Mapping[str, tuple[object, ...]] = {
    "use_sliding_window": (False, None),
    "layer_types": ("full_attention", None),
}

QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    only={**COMMON_ONLY, **FULL_ATTENTION_ONLY},
    defaults={**LLAMA.defaults, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    unread=WITHOUT_WINDOWS,
    switches={},
    always=("qkv_bias",),
)
