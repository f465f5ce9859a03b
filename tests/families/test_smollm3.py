"""Configs of SmolLM3: layers that turn nothing, windows, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rmipo.families.tensors import num_parameters
from tests.families.reading import read, refusal

FULL, SLIDING = "full_attention", "sliding_attention"
# As published, without what says nothing about the model's shape.
SMOLLM3_3B: dict[str, Any] = {
    **{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"},
    **{"hidden_size": 2048, "intermediate_size": 11008, "layer_types": [FULL] * 36, "max_position_embeddings": 65536},
    **{"max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9},
    **{"num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pretraining_tp": 2},
    **{"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None},
    **{"torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 128256},
}


def test_model_as_published_is_tied_and_has_the_published_number_of_parameters(tmp_path: Path) -> None:
    arch = read(tmp_path, SMOLLM3_3B)
    assert (num_parameters(arch), arch.tied_embeddings) == (3_075_098_624, True)
    biased = read(tmp_path, SMOLLM3_3B, attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.attention_output_bias, biased.mlp_bias) == (True, True, True)
    assert [layer for layer in range(36) if arch.kind_of(layer).rope is None] == [3, 7, 11, 15, 19, 23, 27, 31, 35]


@pytest.mark.parametrize(
    "changes",
    [
        {"no_rope_layers": None},
        {"no_rope_layers": None, "no_rope_layer_interval": 3},
        {"no_rope_layers": [0, 1, 1, 1, 0]},
        {"use_sliding_window": True, "sliding_window": 77},
        {"use_sliding_window": True, "sliding_window": 77, "layer_types": None},
        {"use_sliding_window": True, "sliding_window": 77, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {"use_sliding_window": True, "layer_types": None},
        {"sliding_window": 77, "layer_types": None},
    ],
)
def test_layers_are_those_that_transformers_makes_of_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**SMOLLM3_3B, "num_hidden_layers": 4, "layer_types": [FULL] * 4, "no_rope_layers": [1, 0, 1, 0], **changes}
    kinds = read(tmp_path, config).layer_kinds
    theirs = AutoConfig.for_model("smollm3", **config)
    assert [kind.rope is not None for kind in kinds] == [bool(value) for value in theirs.no_rope_layers[:4]]
    assert [kind.window for kind in kinds] == [77 if name == SLIDING else None for name in theirs.layer_types]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must list 0 or 1 for each of 36 layers, found [1, 0]"),
        ({"no_rope_layers": [2] * 36}, "no_rope_layers must list 0 or 1"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be a positive integer"),
        ({"layer_types": [SLIDING] * 36}, "layer_types has 'sliding_attention', but use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"logits_scaling": 8.0}, "knows no logits_scaling"),
    ],
)
def test_what_a_smollm3_may_ask_for_beyond_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, SMOLLM3_3B, **changes)
