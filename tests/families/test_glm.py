"""Configs of GLM-4 as published, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rmipo.families.architecture import Rope
from megatron_rmipo.families.tensors import num_parameters
from tests.families.reading import read, refusal

GLM_9B: dict[str, Any] = {
    **{"architectures": ["GlmForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128},
    **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 131072},
    **{"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    **{"rms_norm_eps": 1.5625e-7, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "vocab_size": 151552},
}
GLM4_9B = {
    **{**GLM_9B, "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "max_position_embeddings": 32768},
    "rms_norm_eps": 1e-5,
}

GLM45_AIR: dict[str, Any] = {
    **{"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128},
    **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072},
    **{"num_attention_heads": 96, "num_hidden_layers": 46, "num_key_value_heads": 8, "partial_rotary_factor": 0.5},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": False, "use_qk_norm": False},
    **{"first_k_dense_replace": 1, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "num_experts_per_tok": 8, "routed_scaling_factor": 1.0, "topk_group": 1, "vocab_size": 151552},
    **{"num_nextn_predict_layers": 1, "model_type": "glm4_moe", "torch_dtype": "bfloat16"},
}
GLM45 = {
    **{**GLM45_AIR, "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92, "use_qk_norm": True},
    **{"first_k_dense_replace": 3, "moe_intermediate_size": 1536, "n_routed_experts": 160, "routed_scaling_factor": 2.5},
}


@pytest.mark.parametrize(
    ("config", "published", "biases", "norms_after"),
    [(GLM_9B, 9_399_951_360, True, False), (GLM4_9B, 9_400_094_720, False, True)],
)
def test_glms_as_published(tmp_path: Path, config: dict[str, Any], published: int, biases: bool, norms_after: bool) -> None:
    arch = read(tmp_path, config)
    assert num_parameters(arch) == published
    assert (arch.qkv_bias, arch.attention_output_bias, arch.post_norm) == (biases, False, norms_after)
    assert (arch.rotary_channels, arch.rotary_interleaved, arch.ropes) == (64, True, (Rope(1e4),))


def test_what_a_glm_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    whole = read(tmp_path, GLM_9B)
    assumed = ("attention_bias", "head_dim", "num_key_value_heads", "partial_rotary_factor", "rope_theta")
    short = {name: value for name, value in GLM_9B.items() if name not in assumed}
    assert read(tmp_path, short) == whole
    joined = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert read(tmp_path, short, rope_parameters=joined) == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "glm4"]),
        ({"attention_bias": 1}, ["attention_bias must be true or false"]),
        ({"partial_rotary_factor": 0.01}, ["partial_rotary_factor is 0.01", "128 channels"]),
        ({"mlp_bias": True}, ["glm4 family", "mlp_bias (which is True)"]),
        ({"rope_scaling": {"rope_type": "mrope"}}, ["rope_type", "'mrope'"]),
    ],
)
def test_what_a_glm_may_ask_for_beyond_is_refused(tmp_path: Path, changes: dict[str, Any], named: list[str]) -> None:
    message = refusal(tmp_path, GLM4_9B, **changes)
    for text in named:
        assert text in message


@pytest.mark.parametrize(("config", "billions"), [(GLM45_AIR, 107), (GLM45, 353)])
def test_glms_with_experts_as_published(tmp_path: Path, config: dict[str, Any], billions: int) -> None:
    arch = read(tmp_path, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    biases = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert num_parameters(arch) == sum(tensor.numel() for tensor in (*model.parameters(), *biases))
    assert round(num_parameters(arch) / 1e9) == billions
    assert (arch.rotary_channels, arch.rotary_interleaved, arch.qkv_bias) == (64, False, True)
    assert arch.qk_norm == config["use_qk_norm"]
    assert arch.experts is not None
    assert (arch.experts.score_bias, arch.experts.num_groups) == (True, None)
