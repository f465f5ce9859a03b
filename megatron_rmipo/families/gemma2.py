"""Gemma 2: norms before and after attention and MLP, a sliding window in every other layer, capped scores and logits.

Source of the names: ``Gemma2ForCausalLM`` of transformers; Megatron-Bridge for norms behind a linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.gemma import GEMMA, read_gemma
from megatron_rmipo.families.layers import every, read_layer_kinds
from megatron_rmipo.families.norm_places import LLAMA_WITHOUT_LAYER_NORMS, norms_after, norms_before


def read_gemma2(fields: Fields) -> Mapping[str, object]:
    """What Gemma 2 and 3 have in common, beside the first."""
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {
        **read_gemma(fields),
        "attention_scale": fields.number("query_pre_attn_scalar") ** -0.5,
        **{name: fields.number(field) for name, field in caps.items() if fields.get(field) is not None},
    }


def _read(fields: Fields) -> Mapping[str, object]:
    return {**read_gemma2(fields), "layer_kinds": read_layer_kinds(fields, every(fields, 2))}


GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    defaults={
        **GEMMA.defaults,
        **{"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    },
    rules=(
        *LLAMA_WITHOUT_LAYER_NORMS,
        *norms_before("input_layernorm", "pre_feedforward_layernorm"),
        *norms_after("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    # How a cache of keys is kept while text is drawn.
    unread=("cache_implementation",),
    always=(*GEMMA.always, "post_norm"),
    read=_read,
)
