"""Configs of Gemma 1 to 3 as published, as transformers reads them, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import LayerKind, LinearScaling, Rope
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import num_parameters

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
_COMMON: dict[str, Any] = {
    **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"},
    **{"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"},
}
GEMMA_2B = {
    **{**_COMMON, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384},
    **{"max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1},
    **{"rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000},
}
GEMMA2_2B = {
    **{**_COMMON, "architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    **{"hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8},
    **{"num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rope_theta": 10000.0},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, "vocab_size": 256000},
}
GEMMA3_1B = {
    **{**_COMMON, "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "final_logit_softcapping": None},
    **{"cache_implementation": "hybrid", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768},
    **{"num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256},
    **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512},
    **{"sliding_window_pattern": 6, "vocab_size": 262144},
}
TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}


def write(directory: Path, config: dict[str, Any], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize(
    ("config", "published"), [(GEMMA_2B, 2_506_172_416), (GEMMA2_2B, 2_614_341_888), (GEMMA3_1B, 999_885_952)]
)
def test_gemmas_as_published(tmp_path: Path, config: dict[str, Any], published: int) -> None:
    arch = read_architecture(write(tmp_path, config))
    assert num_parameters(arch) == published
    assert (arch.tied_embeddings, arch.zero_centered_norm, arch.activation) == (True, True, "gelu_tanh")
    assert (arch.embedding_multiplier, arch.embedding_multiplier_rounded) == (math.sqrt(config["hidden_size"]), True)
    # What they leave to transformers is what transformers makes of it.
    theirs = AutoConfig.for_model(TYPES[arch.family], **{name: config[name] for name in config if "dtype" not in name})
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", ["full_attention"] * arch.num_layers)
    assert [arch.kind_of(layer).window for layer in range(arch.num_layers)] == [
        window if kind == "sliding_attention" else None for kind in types
    ]


def test_gemma_2_caps_scores_and_logits(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, GEMMA2_2B, query_pre_attn_scalar=144))
    assert (arch.attention_softcap, arch.logit_softcap, arch.attention_scale) == (50.0, 30.0, 1 / 12)
    absent = {name: value for name, value in GEMMA2_2B.items() if "softcapping" not in name}
    assert read_architecture(write(tmp_path, absent, query_pre_attn_scalar=144)) == arch
    off = read_architecture(write(tmp_path, GEMMA2_2B, attn_logit_softcapping=None, final_logit_softcapping=None))
    assert (off.attention_softcap, off.logit_softcap) == (None, None)


def test_gemma_3_turns_layers_by_their_kind_in_either_spelling(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    arch = read_architecture(write(tmp_path, GEMMA3_1B, rope_scaling=scaling, sliding_window_pattern=2))
    assert arch.ropes == (Rope(1e6, LinearScaling(8.0)), Rope(1e4))
    assert arch.layer_kinds == (LayerKind(512, 1), LayerKind(None, 0)) * 13
    before = {"rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern"}
    joined = {name: value for name, value in GEMMA3_1B.items() if name not in before}
    joined["rope_parameters"] = {
        "full_attention": {**scaling, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    joined["layer_types"] = ["sliding_attention", "full_attention"] * 13
    assert read_architecture(write(tmp_path, joined)) == arch


def test_the_language_model_of_a_whole_gemma_3_is_saved_as_the_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    text: dict[str, Any] = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 6}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)
    whole = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "models" / "gemma-3-4b-it")
    with pytest.raises(ConversionError, match="vision tower"):
        read_architecture(tmp_path / "models" / "gemma-3-4b-it")
    monkeypatch.chdir(tmp_path)
    (block,) = (part for part in DOCS.read_text(encoding="utf-8").split("```") if "Gemma3ForCausalLM(" in part)
    exec(block, {})
    arch = read_architecture(tmp_path / "models" / "gemma-3-4b-it-text")
    assert (arch.family, arch.num_layers) == ("gemma3", 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "gemma-3-4b-it-text", dtype=torch.bfloat16)
    saved, original = (part.state_dict() for part in (model.model, whole.model.language_model))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (GEMMA_2B, {"hidden_act": "silu"}, ["hidden_act is 'silu'", "'gelu_pytorch_tanh'"]),
        (GEMMA2_2B, {"hidden_activation": "gelu"}, ["hidden_activation is 'gelu'", "gemma2"]),
        (GEMMA2_2B, {"use_bidirectional_attention": True}, ["use_bidirectional_attention is True"]),
        (GEMMA2_2B, {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar must be a positive number"]),
        (GEMMA2_2B, {"final_logit_softcapping": "30"}, ["final_logit_softcapping must be a positive number"]),
        (GEMMA2_2B, {"sliding_window": None}, ["sliding_window must be a positive integer"]),
        (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0", "gemma3"]),
        (GEMMA3_1B, {"sliding_window_pattern": 0}, ["sliding_window_pattern must be a positive integer"]),
        (GEMMA3_1B, {"rope_parameters": {"rope_theta": 1e6}}, ["rope_parameters.rope_theta stands where", "'full_attention'"]),
        (
            GEMMA3_1B,
            {"rope_parameters": {"full_attention": {"rope_type": "mrope"}}},
            ["rope_parameters.full_attention.rope_type", "'mrope'"],
        ),
        (GEMMA3_1B, {"vision_config": {"hidden_size": 4}}, ["gemma3 family", "vision_config"]),
        (GEMMA3_1B, {"architectures": ["Gemma3ForConditionalGeneration"]}, ["vision tower", "docs/checkpoints.md"]),
    ],
)
def test_what_a_gemma_may_ask_for_beyond_is_refused(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConversionError) as caught:
        read_architecture(write(tmp_path, config, **changes))
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)
