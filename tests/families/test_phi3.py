"""Configs of Phi-3 and Phi-4: windows, long and partial rotary embeddings, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.families.architecture import LayerKind, LongRopeScaling, Rope
from megatron_rmipo.families.tensors import num_parameters
from tests.families.reading import read, refusal

# As published, without what says nothing about the model's shape.
PHI3_MINI_4K: dict[str, Any] = {
    **{"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0},
    **{"hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096},
    **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "resid_pdrop": 0.0},
    **{"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0},
    **{"sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064},
}
PHI4 = {
    **PHI3_MINI_4K,
    **{"hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40},
    **{"num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384},
    **{"rope_theta": 250000, "sliding_window": None, "vocab_size": 100352},
}
SHORT, LONG = [1.0 + number / 7 for number in range(48)], [2.0 + number for number in range(48)]
PHI4_MINI = {
    **PHI3_MINI_4K,
    **{"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "num_attention_heads": 24},
    **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "partial_rotary_factor": 0.75, "vocab_size": 200064},
    **{"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}, "sliding_window": 262144},
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "published"), [(PHI3_MINI_4K, 3_821_079_552), (PHI4, 14_659_507_200), (PHI4_MINI, 3_836_021_760)]
)
def test_models_as_published_have_the_published_number_of_parameters(
    tmp_path: Path, config: dict[str, Any], published: int
) -> None:
    assert num_parameters(read(tmp_path, config)) == published


def test_windows_are_those_of_every_layer(tmp_path: Path) -> None:
    assert read(tmp_path, PHI3_MINI_4K).layer_kinds == (LayerKind(2047),) * 32
    assert read(tmp_path, PHI4).layer_kinds == ()


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi4_mini_turns_three_quarters_of_a_head_within_its_first_context(tmp_path: Path, name: str) -> None:
    arch = read(tmp_path, PHI4_MINI, rope_scaling={**PHI4_MINI["rope_scaling"], "type": name})
    assert (arch.kv_channels, arch.turned_channels) == (128, 96)
    (rope,) = arch.ropes
    factor = pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope == Rope(10000.0, LongRopeScaling(tuple(SHORT)), factor, longest_sequence=4096)
    assert (arch.max_position_embeddings, arch.longest_sequence) == (131072, 4096)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resid_pdrop": 0.1}, "resid_pdrop is 0.1, but only 0.0 is supported"),
        ({"embd_pdrop": 0.1}, "embd_pdrop is 0.1, but only 0.0 is supported"),
        ({"partial_rotary_factor": 0.5}, "short_factor has 48 numbers, but rotary embeddings turn 32 pairs"),
        ({"attention_bias": True}, "knows no attention_bias"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT[:5], "long_factor": LONG}}, "short_factor has 5 numbers"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "rope_scaling.long_factor must be a list"),
        ({"layer_types": ["full_attention"] * 32}, "layer_types is 'full_attention'"),
    ],
)
def test_what_a_phi_may_ask_for_beyond_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, PHI4_MINI, **changes)
