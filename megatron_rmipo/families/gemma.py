"""Gemma, the first: norms multiply by one plus their weight, embeddings by the root of their size, the gate is a GELU.

Source of the names: ``GemmaForCausalLM`` of transformers, which are Llama's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import ATTENTION_BIAS, COMMON_ONLY, LLAMA

GELU_TANH = ("gelu_pytorch_tanh",)


def read_gemma(fields: Fields) -> Mapping[str, object]:
    """What every model of the Gemma kind does with its size and its gate."""
    return {"embedding_multiplier": math.sqrt(fields.count("hidden_size")), "activation": "gelu_tanh"}


GEMMA = dataclasses.replace(
    LLAMA,
    name="gemma",
    architectures=("GemmaForCausalLM",),
    only={
        **COMMON_ONLY,
        # The first releases say "gelu" of the approximation by tanh, and newer ones repeat its name in hidden_activation.
        "hidden_act": ("gelu", *GELU_TANH, None),
        "hidden_activation": (*GELU_TANH, None),
        "use_bidirectional_attention": (False, None),
    },
    defaults={
        **LLAMA.defaults,
        **{"max_position_embeddings": 8192, "num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    },
    unread=(),
    switches=ATTENTION_BIAS,
    always=("zero_centered_norm", "embedding_multiplier_rounded"),
    read=read_gemma,
)
