"""Gemma 3, text alone: as Gemma 2, with normed queries and keys and two ropes instead of caps; five of six layers have windows.

Source of the names: ``Gemma3ForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core; all but the two norms are Gemma 2's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.gemma2 import GEMMA2, read_gemma2
from megatron_rmipo.families.layer_ropes import read_layers
from megatron_rmipo.families.norm_places import QK_NORMS


def _read(fields: Fields) -> Mapping[str, object]:
    layers = read_layers(fields, fields.count("sliding_window_pattern"), sliding_base="rope_local_base_freq")
    return {**read_gemma2(fields), **layers}


GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    # transformers has the field, and does nothing by it.
    only={**GEMMA2.only, "attn_logit_softcapping": (None,)},
    defaults={
        **{name: value for name, value in GEMMA2.defaults.items() if not name.endswith("softcapping")},
        **{"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    },
    rules=(*GEMMA2.rules, *QK_NORMS),
    unread=(*GEMMA2.unread, "_sliding_window_pattern"),
    always=(*GEMMA2.always, "qk_norm"),
    read=_read,
)
