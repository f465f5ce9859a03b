"""Ministral, whose layers may differ in their window, and Ministral 3, whose queries grow beyond the original context.

Source of the names: ``MinistralForCausalLM``, ``Ministral3ForCausalLM`` of transformers, which are Llama's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY
from megatron_rmipo.families.mistral import MISTRAL, read_windows
from megatron_rmipo.families.rope import rope_mapping, rope_of


def _read_ministral3(fields: Fields) -> Mapping[str, object]:
    """From the original context on queries are multiplied by ``1 + beta * log(1 + floor(position / context))``, before by one."""
    mapping = rope_mapping(fields)
    grows = bool(mapping.get("llama_4_scaling_beta"))
    rope = rope_of(mapping, fields)
    if grows:
        rope = dataclasses.replace(rope, longest_sequence=mapping.count("original_max_position_embeddings"))
    return {**read_windows(fields), "ropes": (rope,)}


MINISTRAL = dataclasses.replace(
    MISTRAL,
    name="ministral",
    architectures=("MinistralForCausalLM",),
    only=COMMON_ONLY,
)
MINISTRAL3 = dataclasses.replace(
    MISTRAL,
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    defaults={
        **MISTRAL.defaults,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "head_dim": 128,
        "sliding_window": None,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    },
    read=_read_ministral3,
)
