"""Configs of OLMo 2 and 3 as published, as transformers reads them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import LayerKind, Rope, YarnScaling
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import num_parameters

OLMO2_7B: dict[str, Any] = {
    **{"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"},
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    **{"num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_scaling": None},
    **{"rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352},
}
YARN = {
    **{"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0},
    **{"original_max_position_embeddings": 8192, "rope_type": "yarn"},
}
OLMO3_7B = {
    **{**OLMO2_7B, "architectures": ["Olmo3ForCausalLM"], "max_position_embeddings": 65536, "rope_scaling": YARN},
    **{"sliding_window": 4096, "vocab_size": 100278},
}


def write(directory: Path, config: dict[str, Any], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize(("config", "published"), [(OLMO2_7B, 7_298_617_344), (OLMO3_7B, 7_298_011_136)])
def test_olmos_as_published(tmp_path: Path, config: dict[str, Any], published: int) -> None:
    arch = read_architecture(write(tmp_path, config))
    assert num_parameters(arch) == published
    assert (arch.pre_norm, arch.post_norm, arch.qk_norm_whole, arch.qk_norm) == (False, True, True, False)


def test_olmo_3_scales_the_ropes_of_full_layers_alone(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, OLMO3_7B))
    scaling = YarnScaling(8.0, 8192, 32.0, 1.0, True)
    assert arch.ropes == (Rope(5e5, scaling, YARN["attention_factor"]), Rope(5e5))
    assert arch.layer_kinds == (LayerKind(4096, 1), LayerKind(4096, 1), LayerKind(4096, 1), LayerKind(None, 0)) * 8
    theirs = AutoConfig.for_model("olmo3", **{name: OLMO3_7B[name] for name in OLMO3_7B if "dtype" not in name})
    assert theirs.layer_types == ["full_attention" if kind.window is None else "sliding_attention" for kind in arch.layer_kinds]
    joined = {name: value for name, value in OLMO3_7B.items() if name not in ("rope_scaling", "rope_theta")}
    assert read_architecture(write(tmp_path, joined, rope_parameters=theirs.rope_parameters)) == arch


def test_layers_of_an_olmo_3_that_turn_alike_have_one_rope(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, OLMO3_7B, rope_scaling=None, layer_types=["sliding_attention"] * 32))
    assert arch.ropes == (Rope(5e5),)
    assert arch.layer_kinds == (LayerKind(4096),) * 32


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (OLMO2_7B, {"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        (OLMO2_7B, {"clip_qkv": 8.0}, ["olmo2 family", "clip_qkv (which is 8.0)"]),
        (OLMO2_7B, {"sliding_window": 128}, ["olmo2 family", "sliding_window (which is 128)"]),
        (OLMO3_7B, {"layer_types": ["chunked_attention"] * 32}, ["layer_types has 'chunked_attention'"]),
        (OLMO3_7B, {"rope_parameters": YARN}, ["rope_parameters.", "stands where ropes are told by type of layer"]),
    ],
)
def test_what_an_olmo_may_ask_for_beyond_is_refused(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConversionError) as caught:
        read_architecture(write(tmp_path, config, **changes))
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)
