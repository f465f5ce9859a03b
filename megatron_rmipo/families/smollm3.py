"""SmolLM3: some layers, every fourth by default, turn no queries and keys; their attention knows order by the mask alone.

Source of the names: ``SmolLM3ForCausalLM`` of transformers, which are Llama's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.architecture import LayerKind
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layers import FULL, SLIDING, has_windows, read_layer_kinds
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA


def _read(fields: Fields) -> Mapping[str, object]:
    turned = _turned_layers(fields)
    windows = has_windows(fields)
    if not windows and SLIDING in (fields.get("layer_types") or ()):
        raise fields.error("layer_types", f"has {SLIDING!r}, but use_sliding_window and sliding_window give no window")
    default = [SLIDING if windows and not rope else FULL for rope in turned]
    kinds = read_layer_kinds(fields, default) or (LayerKind(),) * len(turned)
    ropes = [0 if rope else None for rope in turned]
    return {"layer_kinds": tuple(dataclasses.replace(kind, rope=rope) for kind, rope in zip(kinds, ropes, strict=True))}


def _turned_layers(fields: Fields) -> list[bool]:
    """Whether each layer turns its queries and keys; in ``no_rope_layers`` 1 says that it does."""
    num_layers, listed = fields.count("num_hidden_layers"), fields.get("no_rope_layers")
    if listed is None:
        interval = fields.count("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers or any(value not in (0, 1) for value in listed):
        raise fields.error("no_rope_layers", f"must list 0 or 1 for each of {num_layers} layers, found {listed!r:.100}")
    return [bool(value) for value in listed[:num_layers]]


SMOLLM3 = dataclasses.replace(
    LLAMA,
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    only=COMMON_ONLY,
    defaults={
        **LLAMA.defaults,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    # The second where layers are listed one by one.
    unread=("max_window_layers", "no_rope_layer_interval"),
    read=_read,
)
