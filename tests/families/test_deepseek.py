"""DeepSeek configs as they are published, and what of them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import Experts, LatentAttention, ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import num_parameters

# As published, without fp8 and the rotary scaling, and what says nothing about the model.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE = {
    **V3,
    "model_type": "deepseek_v2",
    **{"architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944},
    **{"moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False},
    **{"num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16},
    **{"q_lora_rank": None, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy"},
    **{"vocab_size": 102400, "num_nextn_predict_layers": 0},
}


def read(folder: Path, config: dict[str, Any]) -> ModelArchitecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def test_published_models_are_read(tmp_path: Path) -> None:
    arch = read(tmp_path, V3)
    assert arch.latent == LatentAttention(1536, 512, 128, 64, 128)
    assert (arch.kv_channels, arch.rotary_channels, arch.rotary_interleaved) == (192, 64, True)
    assert (arch.query_size, arch.context_size, arch.num_query_groups) == (128 * 192, 128 * 128, 128)
    assert arch.experts == Experts(
        **{"num_experts": 256, "per_token": 8, "ffn_hidden_size": 2048, "shared_ffn_hidden_size": 2048, "scaling": 2.5},
        **{"score_function": "sigmoid", "score_bias": True, "num_groups": 8, "groups_per_token": 4},
        dense_layers=frozenset(range(3)),
    )
    lite = read(tmp_path, V2_LITE)
    assert lite.latent == LatentAttention(None, 512, 128, 64, 128)
    assert lite.experts == Experts(
        num_experts=64,
        per_token=6,
        ffn_hidden_size=1408,
        dense_layers=frozenset({0}),
        shared_ffn_hidden_size=2816,
        normalized=False,
    )
    # As the first layers are, all of it.
    assert read(tmp_path, {**V3, "num_hidden_layers": 3}).experts is None


@pytest.mark.parametrize(("name", "value"), [("norm_topk_prob", True), ("rope_interleave", False)])
def test_what_transformers_computes_of_v3_alone_is_refused_of_v2(name: str, value: bool, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=name):
        read(tmp_path, {**V2_LITE, name: value})


def test_keys_may_be_turned_half_by_half(tmp_path: Path) -> None:
    assert not read(tmp_path, {**V3, "rope_interleave": False}).rotary_interleaved


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"topk_method": "group_limited_greedy"}, ["topk_method is 'group_limited_greedy'"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq is 2"]),
        ({"kv_lora_rank": None}, ["kv_lora_rank must be a positive integer"]),
    ],
)
@pytest.mark.parametrize("published", [V3, V2_LITE])
def test_refusals_name_the_field(published: dict[str, Any], changes: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        read(tmp_path, {**published, **changes})
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)


@pytest.mark.parametrize("mscale_all_dim", [1.0, 0.707, 0])
def test_yarn_changes_the_factor_of_the_scores(mscale_all_dim: float, tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": mscale_all_dim}
    scale = read(tmp_path, {**V3, "rope_scaling": scaling}).attention_scale
    expected = yarn_apply_mscale({**scaling, "rope_type": "yarn"}, 192**-0.5)
    assert (192**-0.5 if scale is None else scale) == pytest.approx(expected)


def test_one_group_of_experts_is_none(tmp_path: Path) -> None:
    experts = read(tmp_path, {**V3, "n_group": 1, "topk_group": 1}).experts
    assert experts is not None
    assert (experts.num_groups, experts.groups_per_token) == (None, None)


def test_latents_are_normed_as_transformers_norms_them_whatever_the_others_are(tmp_path: Path) -> None:
    arch = read(tmp_path, {**V3, "rms_norm_eps": 1e-5})
    assert arch.latent is not None
    assert (arch.layernorm_epsilon, arch.latent.norm_epsilon) == (1e-5, 1e-6)


@pytest.mark.parametrize(("published", "billions"), [(V3, 671.0), (V2_LITE, 15.7)])
def test_published_numbers_of_parameters(published: dict[str, Any], billions: float, tmp_path: Path) -> None:
    arch = read(tmp_path, published)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    biases = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert num_parameters(arch) == sum(tensor.numel() for tensor in (*model.parameters(), *biases))
    assert round(num_parameters(arch) / 1e9, 1) == billions
