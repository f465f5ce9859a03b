"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values are one matrix, and so are gate and up; a part of a head may be turned.

Source of the names: ``Phi3ForCausalLM`` of transformers; all but the two joined matrices are Llama's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.base import Layout
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, HF_LAYER, LLAMA
from megatron_rmipo.families.mistral import read_windows
from megatron_rmipo.families.rope import read_partial_rope

_JOINED = {Layout.QKV: "self_attn.qkv_proj.weight", Layout.GATE_UP: "mlp.gate_up_proj.weight"}
# What the first Phi-3 called it.
_ROPE_TYPES = {"su": "longrope", "yarn": "longrope"}


def _read(fields: Fields) -> Mapping[str, object]:
    return {**read_partial_rope(fields, _ROPE_TYPES), **read_windows(fields)}


PHI3 = dataclasses.replace(
    LLAMA,
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    only={
        **{field: allowed for field, allowed in COMMON_ONLY.items() if field != "partial_rotary_factor"},
        "resid_pdrop": (0.0,),
        "embd_pdrop": (0.0,),
        "layer_types": (None,),
    },
    defaults={
        **LLAMA.defaults,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    rules=tuple(
        dataclasses.replace(rule, sources=(HF_LAYER + _JOINED[rule.layout],)) if rule.layout in _JOINED else rule
        for rule in LLAMA.rules
        if not rule.is_bias
    ),
    # Of the authors' own code, with values that ask for nothing.
    unread=("full_attn_mod", "interpolate_factor"),
    switches={},
    read=_read,
)
