"""Mistral, and Mistral-Nemo, whose heads have a size of their own.

Source of the names: ``MistralForCausalLM`` of transformers, which are Llama's; the sliding window has no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.architecture import LayerKind
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA


def read_window(fields: Fields) -> Mapping[str, object]:
    """The sliding window, one for all layers, as a field of the architecture."""
    if fields.get("sliding_window") is None:
        return {}
    return {"layer_kinds": (LayerKind(window=fields.count("sliding_window")),) * fields.count("num_hidden_layers")}


MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    only={**COMMON_ONLY, "layer_types": (None,)},
    defaults={**LLAMA.defaults, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    unread=(),
    switches={},
    read=read_window,
)
