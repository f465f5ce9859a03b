"""Configs of Granite: its multipliers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.families.tensors import num_parameters
from tests.families.reading import read, refusal

# Granite 3.1 as published, without what says nothing about the model's shape.
GRANITE_2B: dict[str, Any] = {
    **{"architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "mlp_bias": False},
    **{"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    **{"hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072},
    **{"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    **{"rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
    "vocab_size": 49155,
}
GRANITE_8B = {
    **GRANITE_2B,
    **{"attention_multiplier": 0.0078125, "logits_scaling": 16.0, "hidden_size": 4096, "intermediate_size": 12800},
}


@pytest.mark.parametrize(("config", "published"), [(GRANITE_2B, 2_533_531_648), (GRANITE_8B, 8_170_848_256)])
def test_models_as_published_have_the_published_number_of_parameters(
    tmp_path: Path, config: dict[str, Any], published: int
) -> None:
    assert num_parameters(read(tmp_path, config)) == published


def test_multipliers_are_those_of_the_config(tmp_path: Path) -> None:
    arch = read(tmp_path, GRANITE_2B)
    assert (arch.embedding_multiplier, arch.residual_multiplier, arch.logit_multiplier) == (12.0, 0.22, 0.125)
    assert arch.attention_scale == 0.015625
    # Scores are not divided by the root of the head's size where the config leaves the multiplier out.
    plain = read(tmp_path, {name: value for name, value in GRANITE_2B.items() if "multiplier" not in name})
    assert (plain.embedding_multiplier, plain.attention_scale, plain.residual_multiplier) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits_scaling": 0}, "logits_scaling must be a positive number, found 0"),
        ({"attention_multiplier": "auto"}, "attention_multiplier must be a positive number, found 'auto'"),
        ({"residual_multiplier": None}, "residual_multiplier must be a positive number, found None"),
        ({"num_local_experts": 8}, "knows no num_local_experts"),
        ({"sliding_window": 77}, "knows no sliding_window"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, GRANITE_2B, **changes)
