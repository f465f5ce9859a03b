"""Configs of Ministral and Ministral 3: windows by layer, and queries that grow beyond the original context."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.families.architecture import LayerKind, Rope, YarnScaling
from megatron_rmipo.families.tensors import num_parameters
from tests.families.reading import read, refusal

FULL, SLIDING = "full_attention", "sliding_attention"
# Ministral-8B-Instruct-2410 as published, without what says nothing about the model's shape.
MINISTRAL_8B: dict[str, Any] = {
    **{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu"},
    **{"hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 32768, "num_attention_heads": 32},
    **{"num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 100000000.0},
    **{"sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 131072},
}
MIXED = {"architectures": ["MinistralForCausalLM"], "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 9}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
# The text model of Ministral 3, where what it says of its embeddings is what it would be without.
MINISTRAL3: dict[str, Any] = {
    **{name: value for name, value in MINISTRAL_8B.items() if name != "rope_theta"},
    **{"architectures": ["Ministral3ForCausalLM"], "sliding_window": None, "max_position_embeddings": 262144},
    **{"intermediate_size": 14336, "num_hidden_layers": 34, "rope_parameters": {**YARN, "max_position_embeddings": 262144}},
}


@pytest.mark.parametrize("changes", [{}, MIXED])
def test_ministral_has_the_published_number_of_parameters(tmp_path: Path, changes: dict[str, Any]) -> None:
    arch = read(tmp_path, MINISTRAL_8B, **changes)
    assert num_parameters(arch) == 8_019_808_256
    assert arch.layer_kinds == ((LayerKind(), *[LayerKind(32768)] * 3) * 9 if changes else (LayerKind(32768),) * 36)


def test_ministrals_layers_all_have_the_window_unless_they_are_listed(tmp_path: Path) -> None:
    plain = {**MINISTRAL_8B, "architectures": ["MinistralForCausalLM"]}
    assert read(tmp_path, plain).layer_kinds == (LayerKind(32768),) * 36
    assert read(tmp_path, plain, sliding_window=None).layer_kinds == ()


def test_queries_of_ministral3_are_its_own_within_the_original_context(tmp_path: Path) -> None:
    arch = read(tmp_path, MINISTRAL3)
    assert arch.ropes == (Rope(1e6, YarnScaling(16.0, 16384), 1.0, longest_sequence=16384),)
    assert (arch.kv_channels, arch.layer_kinds, arch.longest_sequence) == (128, (), 16384)
    unsaid = {name: value for name, value in MINISTRAL3.items() if name not in ("rope_parameters", "head_dim")}
    assert read(tmp_path, unsaid) == arch
    same = read(tmp_path, MINISTRAL3, rope_parameters={**YARN, "llama_4_scaling_beta": 0.0})
    assert same == dataclasses.replace(arch, ropes=(Rope(1e6, YarnScaling(16.0, 16384)),))
    assert same.longest_sequence == 262144


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (MINISTRAL_8B, {"rope_parameters": YARN}, "rope_parameters.llama_4_scaling_beta is 0.1, which is not built"),
        (MINISTRAL_8B, {"layer_types": [FULL] * 36}, "layer_types is 'full_attention'"),
        ({**MINISTRAL_8B, **MIXED}, {"layer_types": ["chunked_attention"] * 36}, "layer_types has 'chunked_attention'"),
        (MINISTRAL3, {"rope_parameters": {**YARN, "original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        (MINISTRAL3, {"vision_config": {"depth": 3}}, "knows no vision_config"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, config, **changes)
