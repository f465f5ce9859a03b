"""Qwen3, dense: the queries and keys of each head are normed.

Source of the names: ``Qwen3ForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core; all but the two norms are Llama's.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.families.llama import ATTENTION_BIAS, COMMON_ONLY, LLAMA
from megatron_rmipo.families.norm_places import QK_NORMS
from megatron_rmipo.families.qwen2 import WINDOW_DEFAULTS, read_qwen_windows

QWEN3 = dataclasses.replace(
    LLAMA,
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    only=COMMON_ONLY,
    defaults={
        **LLAMA.defaults,
        **WINDOW_DEFAULTS,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    rules=(
        *LLAMA.rules,
        *QK_NORMS,
    ),
    unread=(),
    switches=ATTENTION_BIAS,
    always=("qk_norm",),
    read=read_qwen_windows,
)
