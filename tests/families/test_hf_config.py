"""Reading config.json: what is supported, and what is refused by field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import LayerKind, Llama3Scaling, Rope, YarnScaling
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import num_parameters
from megatron_rmipo.families.unbuilt import UNBUILT

LLAMA31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 203,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}


def write(directory: Path, **changes: Any) -> Path:
    config = {**LLAMA31, **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return directory


def test_reads_llama31(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path))
    assert arch.family == "llama"
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (3, 96, 200)
    assert (arch.num_attention_heads, arch.num_query_groups, arch.kv_channels) == (6, 2, 16)
    assert arch.ropes == (Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)),)
    assert (arch.dtype, arch.tied_embeddings) == ("bfloat16", False)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "NemotronHForCausalLM"])
def test_architectures_known_not_to_be_built_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConversionError, match=f"{name} is not supported: the state of its .* layers after a prompt"):
        read_architecture(write(tmp_path, architectures=[name]))


def test_no_family_is_said_not_to_be_built() -> None:
    assert not UNBUILT.keys() & {name for family in FAMILIES.values() for name in family.architectures}


def test_rope_parameters_of_transformers_5_say_the_same(tmp_path: Path) -> None:
    before = read_architecture(write(tmp_path))
    joined = {**LLAMA31["rope_scaling"], "rope_theta": 500000.0}
    after = read_architecture(write(tmp_path, rope_scaling="absent", rope_theta="absent", rope_parameters=joined))
    assert after == before


def test_qwens_yarn_is_read_as_published(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    arch = read_architecture(write(tmp_path, architectures=["Qwen2ForCausalLM"], rope_scaling=scaling))
    assert arch.ropes == (Rope(500000.0, YarnScaling(4.0, 32768), pytest.approx(1.1386294)),)


def test_what_says_nothing_about_the_model_is_ignored(tmp_path: Path) -> None:
    plain = read_architecture(write(tmp_path))
    # As SmolLM2, Llama 2 and others carry it; what is off asks for nothing, known or not.
    beside = {"is_llama_config": True, "pretraining_tp": 4, "temperature": 0.6, "transformers.js_config": {"dtype": "q4"}}
    off = {"rope_interleaved": False, "logits_scaling": None, "embd_pdrop": 0.0}
    assert read_architecture(write(tmp_path, **beside, **off, sliding_window=4096)) == plain


@pytest.mark.parametrize(("attention", "mlp"), [(True, False), (False, True), (True, True)])
def test_llamas_biases_are_those_of_attention_and_mlp(tmp_path: Path, attention: bool, mlp: bool) -> None:
    plain = read_architecture(write(tmp_path))
    arch = read_architecture(write(tmp_path, attention_bias=attention, mlp_bias=mlp))
    assert arch == dataclasses.replace(plain, qkv_bias=attention, attention_output_bias=attention, mlp_bias=mlp)


def test_mistral_keeps_its_window_and_head_size(tmp_path: Path) -> None:
    changes = {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "sliding_window": 77, "head_dim": 20}
    arch = read_architecture(write(tmp_path, **changes))
    assert (arch.family, arch.kv_channels, arch.ropes) == ("mistral", 20, (Rope(500000.0),))
    assert arch.layer_kinds == (LayerKind(77),) * arch.num_layers
    assert read_architecture(write(tmp_path, **{**changes, "sliding_window": None})).layer_kinds == ()


# As published, without what says nothing about the model's shape.
QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN25_05B = {
    **QWEN25_7B,
    **{"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24},
    **{"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936},
}

QWEN3_06B = {
    **{name: value for name, value in QWEN25_05B.items() if name != "sliding_window"},
    **{"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "sliding_window": None},
    **{"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28},
    **{"num_key_value_heads": 8, "max_position_embeddings": 40960},
}
# Of Mistral-Nemo, the same.
NEMO = {
    **{name: QWEN25_7B[name] for name in ("attention_dropout", "hidden_act", "rope_theta", "tie_word_embeddings", "torch_dtype")},
    **{"architectures": ["MistralForCausalLM"], "head_dim": 128, "sliding_window": None, "rms_norm_eps": 1e-5},
    **{"hidden_size": 5120, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 40},
    **{"num_key_value_heads": 8, "max_position_embeddings": 1024000, "vocab_size": 131072},
}
PUBLISHED = [
    (QWEN25_7B, 7_615_616_512),
    (QWEN25_05B, 494_032_768),
    (QWEN3_06B, 596_049_920),
    (NEMO, 12_247_782_400),
]


@pytest.mark.parametrize(("config", "published"), PUBLISHED)
def test_models_as_published_have_the_published_number_of_parameters(
    tmp_path: Path, config: dict[str, Any], published: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = read_architecture(tmp_path)
    assert num_parameters(arch) == published
    assert arch.layer_kinds == ()


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"max_window_layers": 2}, [None, None, 77]),
        ({"max_window_layers": 0}, [77, 77, 77]),
        ({"layer_types": [SLIDING, FULL, SLIDING]}, [77, None, 77]),
        ({"layer_types": [FULL] * 3, "max_window_layers": 1}, []),
        ({"sliding_window": None, "max_window_layers": 1}, []),
        ({}, []),
    ],
)
def test_layers_of_a_qwen_may_have_windows(tmp_path: Path, name: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    beside = {"architectures": [name], "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 77}
    config = {**QWEN25_7B, **beside, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [kind.window for kind in read_architecture(tmp_path).layer_kinds] == windows
    # transformers makes the same of it.
    theirs = AutoConfig.for_model("qwen2" if name.startswith("Qwen2") else "qwen3", **config)
    assert [theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types] == (windows or [None] * 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": [FULL] * 27 + [SLIDING]}, ["layer_types has 'sliding_attention'", "no window"]),
        ({"layer_types": [FULL] * 27 + ["linear_attention"]}, ["layer_types has 'linear_attention'", "'full_attention'"]),
        ({"layer_types": [FULL] * 27}, ["layer_types must list a type for each of 28 layers"]),
        ({"use_sliding_window": True, "max_window_layers": None}, ["max_window_layers must be a number of layers"]),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 0}, ["sliding_window must be a positive"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, ["'mrope'"]),
    ],
)
def test_what_a_qwen_may_ask_for_beyond_is_refused(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN25_7B, "layer_types": ["full_attention"] * 28}))
    read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**QWEN25_7B, **changes}))
    with pytest.raises(ConversionError) as caught:
        read_architecture(tmp_path)
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["CohereForCausalLM"]}, ["CohereForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"]),
        ({"architectures": "absent"}, ["architectures is missing"]),
        ({"attention_bias": "yes"}, ["attention_bias must be true or false", "'yes'"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, ["'ntk'", "'llama3'", "'yarn'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 0.0}}, ["rope_scaling.factor must be a positive number", "0.0"]),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, ["rope_scaling.factor", "'4'"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "mrope_section": [3, 5]}}, ["rope_scaling.mrope_section", "[3, 5]"]),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, ["rope_scaling.partial_rotary_factor", "0.5"]),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}},
            ["short_factor has 1 numbers", "8 pairs"],
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": "2"}},
            ["rope_scaling.long_factor must be a list of positive numbers", "'2'"],
        ),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                "original_max_position_embeddings": 1,
            },
            ["original_max_position_embeddings is 1"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling.low_freq_factor"]),
        ({"num_hidden_layers": "absent"}, ["num_hidden_layers", "None"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads 6", "num_key_value_heads 4"]),
        ({"hidden_size": 100}, ["hidden_size 100", "6"]),
        ({"logits_scaling": 8.0}, ["llama family", "logits_scaling (which is 8.0)", "remove"]),
        ({"num_local_experts": 8, "final_logit_softcapping": 30.0}, ["final_logit_softcapping", "num_local_experts"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["float8_e4m3fn"]),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        read_architecture(write(tmp_path, **changes))
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)


def test_missing_and_damaged_config(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no config\.json"):
        read_architecture(tmp_path)
    with pytest.raises(ConversionError, match="does not exist"):
        read_architecture(tmp_path / "typo")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="cannot be read"):
        read_architecture(tmp_path)
