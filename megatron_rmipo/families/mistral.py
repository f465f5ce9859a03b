"""Mistral, and Mistral-Nemo, whose heads have a size of their own.

Source of the names: ``MistralForCausalLM`` of transformers, which are Llama's; the sliding window has no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layers import FULL, SLIDING, read_layer_kinds
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA


def read_windows(fields: Fields) -> Mapping[str, object]:
    """The attention of the layers, all with the window unless the config lists them."""
    kind = FULL if fields.get("sliding_window") is None else SLIDING
    return {"layer_kinds": read_layer_kinds(fields, [kind] * fields.count("num_hidden_layers"))}


MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architectures=("MistralForCausalLM",),
    only={**COMMON_ONLY, "layer_types": (None,)},
    defaults={**LLAMA.defaults, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    unread=(),
    switches={},
    read=read_windows,
)
