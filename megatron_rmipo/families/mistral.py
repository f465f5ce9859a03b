"""Mistral, and Mistral-Nemo, whose heads have a size of their own.

Source of the names: ``MistralForCausalLM`` of transformers, which are Llama's; the sliding window has no weights.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA

MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    only={**COMMON_ONLY, "layer_types": (None,)},
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    has_sliding_window=True,
    unread=(),
    switches={},
)
