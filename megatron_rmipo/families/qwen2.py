"""Qwen2 and Qwen2.5. Source of the names: ``Qwen2ForCausalLM`` of transformers, which are Llama's; q, k and v have biases."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layers import FULL, SLIDING, has_windows, read_layer_kinds
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA

# Windows are off in all but a few of Qwen's models.
WINDOW_DEFAULTS: Mapping[str, object] = {"sliding_window": 4096, "max_window_layers": 28}


def read_qwen_windows(fields: Fields, has_window: Callable[[int, int], bool] = operator.ge) -> Mapping[str, object]:
    """The attention of layers of Qwen models, of which some may have a window.

    Args:
        fields: the config.
        has_window: says whether a layer has one, of its number and ``max_window_layers``, where the config lists no types.
    """
    num_layers, first = fields.count("num_hidden_layers"), fields.get("max_window_layers")
    default = [FULL] * num_layers
    if has_windows(fields):
        if isinstance(first, bool) or not isinstance(first, int):
            raise fields.error("max_window_layers", f"must be a number of layers, found {first!r}")
        default = [SLIDING if has_window(layer, first) else FULL for layer in range(num_layers)]
    elif SLIDING in (fields.get("layer_types") or ()):
        raise fields.error("layer_types", f"has {SLIDING!r}, but use_sliding_window and sliding_window give no window")
    return {"layer_kinds": read_layer_kinds(fields, default)}


QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    only=COMMON_ONLY,
    defaults={**LLAMA.defaults, **WINDOW_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    unread=(),
    switches={},
    always=("qkv_bias",),
    read=read_qwen_windows,
)
