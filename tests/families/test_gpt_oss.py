"""gpt-oss: its config as published, what of it is refused, and experts that ranks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import Experts, LayerKind, Rope, YarnScaling
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import num_parameters

FULL, SLIDING = "full_attention", "sliding_attention"
# As published, but for the 4 bits.
GPT_OSS_20B: dict[str, Any] = {
    **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0},
    **{"eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880},
    **{"initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": [SLIDING, FULL] * 12},
    **{"max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24},
    **{"num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999},
    **{"rms_norm_eps": 1e-5, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0},
    **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 201088},
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
}
GPT_OSS_120B = {**GPT_OSS_20B, "num_hidden_layers": 36, "num_local_experts": 128, "layer_types": [SLIDING, FULL] * 18}
# What none of them says is as transformers has it.
LEAST = {name: GPT_OSS_20B[name] for name in ("architectures", "hidden_size", "intermediate_size", "vocab_size")} | {
    **{"num_attention_heads": 64, "num_hidden_layers": 3, "num_local_experts": 8},
}
YARN = Rope(150000.0, YarnScaling(32.0, 4096, 32.0, 1.0, truncate=False), pytest.approx(1.3465736))


def write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(("config", "published"), [(GPT_OSS_20B, 20_914_757_184), (GPT_OSS_120B, 116_829_156_672)])
def test_models_as_published(tmp_path: Path, config: dict[str, Any], published: int) -> None:
    arch = read_architecture(write(tmp_path, config))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert num_parameters(arch) == published == theirs.num_parameters()
    assert arch.layer_kinds == (LayerKind(128), LayerKind()) * (arch.num_layers // 2)
    assert arch.ropes == (YARN,)
    experts = Experts(config["num_local_experts"], 4, 2880, router_bias=True, bias=True, aux_loss_coeff=0.9)
    assert (arch.experts, arch.activation, arch.activation_limit) == (experts, "clamped_swiglu", 7.0)


def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    arch, theirs = read_architecture(write(tmp_path, LEAST)), AutoConfig.for_model("gpt_oss", **LEAST)
    assert [kind.window for kind in arch.layer_kinds] == [128, None, 128]
    assert theirs.layer_types == [SLIDING, FULL, SLIDING]
    assert arch.ropes == (YARN,)
    assert (arch.num_query_groups, arch.kv_channels) == (theirs.num_key_value_heads, theirs.head_dim)
    assert arch.qkv_bias
    assert arch.attention_output_bias
    # A mapping is taken as it is, with the family's own theta.
    plain = read_architecture(write(tmp_path, {**LEAST, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    assert plain.ropes[0].base == 150000.0 == AutoConfig.for_model("gpt_oss", **LEAST).rope_parameters["rope_theta"]
    assert plain.ropes[0].scaling != arch.ropes[0].scaling
    unbiased = read_architecture(write(tmp_path, {**LEAST, "attention_bias": False}))
    assert not unbiased.qkv_bias
    assert not unbiased.attention_output_bias


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts_per_token": 2}, ["experts_per_token is 2, but num_experts_per_tok 4"]),
        ({"swiglu_alpha": 1.5}, ["swiglu_alpha is 1.5", "1.702"]),
        ({"swiglu_limit": 0.0}, ["swiglu_limit must be a positive number"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        ({"layer_types": [SLIDING, "chunked_attention", FULL]}, ["layer_types has 'chunked_attention'"]),
        ({"sliding_window": None}, ["sliding_window must be a positive integer"]),
        ({"num_shared_experts": 1}, ["num_shared_experts (which is 1)"]),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
            ["quantized ('mxfp4')", "Mxfp4Config(dequantize=True)", "save_pretrained"],
        ),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConversionError) as caught:
        read_architecture(write(tmp_path, {**LEAST, **changes}))
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)
