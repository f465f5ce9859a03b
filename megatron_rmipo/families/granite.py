"""Granite 3, dense: numbers of the config multiply embeddings, scores, what is added to the residual stream, and logits.

Source of the names: ``GraniteForCausalLM`` of transformers, which are Llama's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, LLAMA


def _read(fields: Fields) -> Mapping[str, object]:
    return {
        "embedding_multiplier": fields.number("embedding_multiplier"),
        "attention_scale": fields.number("attention_multiplier"),
        "residual_multiplier": fields.number("residual_multiplier"),
        "logit_multiplier": 1.0 / fields.number("logits_scaling"),
    }


_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
GRANITE = dataclasses.replace(
    LLAMA,
    name="granite",
    architectures=("GraniteForCausalLM",),
    only={field: allowed for field, allowed in COMMON_ONLY.items() if field != "attention_dropout"},
    defaults={**LLAMA.defaults, **dict.fromkeys(_MULTIPLIERS, 1.0)},
    # Published with the dropout of its pretraining. Preference training has none, here as in other trainers.
    unread=("attention_dropout",),
    read=_read,
)
