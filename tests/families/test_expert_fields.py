"""Mixtures of experts in config.json: models as they are published, and what is refused by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import Experts, LayerKind
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import layer_parameters, num_parameters

_COMMON: dict[str, Any] = {
    **{"attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"output_router_logits": False, "router_aux_loss_coef": 0.001, "rope_scaling": None},
}
# As published, without what says nothing about the model's shape.
MIXTRAL_8X7B = {
    **_COMMON,
    **{"architectures": ["MixtralForCausalLM"], "sliding_window": None, "router_aux_loss_coef": 0.02, "rms_norm_eps": 1e-5},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    **{"num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8, "rope_theta": 1000000.0, "vocab_size": 32000},
    "max_position_embeddings": 32768,
}
QWEN3_30B_A3B = {
    **_COMMON,
    **{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 128, "rms_norm_eps": 1e-6},
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_hidden_layers": 48},
    **{"num_key_value_heads": 4, "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768},
    **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "rope_theta": 1000000.0, "vocab_size": 151936},
    **{"max_position_embeddings": 40960, "max_window_layers": 48, "sliding_window": None, "use_sliding_window": False},
}
QWEN15_MOE_A27B = {
    **_COMMON,
    **{"architectures": ["Qwen2MoeForCausalLM"], "rms_norm_eps": 1e-6, "norm_topk_prob": False, "decoder_sparse_step": 1},
    **{"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 24},
    **{"num_key_value_heads": 16, "num_experts_per_tok": 4, "num_experts": 60, "moe_intermediate_size": 1408},
    **{"shared_expert_intermediate_size": 5632, "rope_theta": 1000000.0, "vocab_size": 151936},
    **{"max_position_embeddings": 8192, "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False},
}
OLMOE_1B_7B = {
    **_COMMON,
    **{"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None, "norm_topk_prob": False},
    **{"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 16},
    **{"num_key_value_heads": 16, "num_experts_per_tok": 8, "num_experts": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    **{"max_position_embeddings": 4096, "vocab_size": 50304, "router_aux_loss_coef": 0.01},
}
PUBLISHED = [
    (MIXTRAL_8X7B, 46_702_792_704, Experts(8, 2, 14336, aux_loss_coeff=0.02)),
    (QWEN3_30B_A3B, 30_532_122_624, Experts(128, 8, 768, aux_loss_coeff=0.001)),
    (
        QWEN15_MOE_A27B,
        14_315_784_192,
        Experts(60, 4, 1408, shared_ffn_hidden_size=5632, shared_gate=True, normalized=False, aux_loss_coeff=0.001),
    ),
    (OLMOE_1B_7B, 6_919_161_856, Experts(64, 8, 1024, normalized=False, aux_loss_coeff=0.01)),
]


def write(directory: Path, config: dict[str, Any], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


@pytest.mark.parametrize(("config", "published", "experts"), PUBLISHED)
def test_models_as_published_have_the_published_number_of_parameters(
    tmp_path: Path, config: dict[str, Any], published: int, experts: Experts
) -> None:
    arch = read_architecture(write(tmp_path, config))
    assert arch.experts == experts
    assert num_parameters(arch) == published


def test_layers_without_experts_are_those_that_transformers_makes_so(tmp_path: Path) -> None:
    arch = read_architecture(write(tmp_path, QWEN3_30B_A3B, num_hidden_layers=7, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert sorted(arch.expert_layers) == [1, 5]
    dense, sparse = layer_parameters(arch, 0), layer_parameters(arch, 1)
    assert (dense.expert, dense.num_experts) == (0, 0)
    assert (sparse.expert, sparse.num_experts) == (3 * 2048 * 768, 128)
    assert dense.cut - sparse.cut == 3 * 2048 * 6144
    assert sparse.whole - dense.whole == 2048 * 128


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    said = {**QWEN3_30B_A3B, "num_local_experts": 128}
    expected = read_architecture(write(tmp_path, QWEN3_30B_A3B))
    assert read_architecture(write(tmp_path, said)) == expected
    del said["num_experts"]
    assert read_architecture(write(tmp_path, said)) == expected


def test_windows_of_sparse_qwens_are_where_transformers_has_them(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 77, "num_hidden_layers": 5, "max_window_layers": 4}
    arch = read_architecture(write(tmp_path, QWEN3_30B_A3B, **windows))
    assert [kind.window for kind in arch.layer_kinds] == [77] * 5
    arch = read_architecture(write(tmp_path, QWEN15_MOE_A27B, **windows, model_type="qwen2_moe"))
    assert [kind.window for kind in arch.layer_kinds] == [77, None, 77, None, None]
    assert arch.layer_kinds == tuple(
        LayerKind(77 if kind == "sliding_attention" else None) for kind in AutoConfig.from_pretrained(tmp_path).layer_types
    )


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (QWEN3_30B_A3B, {"num_local_experts": 64}, ["num_experts is 128, but num_local_experts 64"]),
        (QWEN3_30B_A3B, {"mlp_only_layers": [3, 48]}, ["mlp_only_layers", "0 to 47", "48"]),
        (QWEN3_30B_A3B, {"layer_types": ["sliding_attention"] * 48}, ["layer_types is 'sliding_attention'", "qwen3_moe"]),
        (QWEN15_MOE_A27B, {"layer_types": ["sliding_attention"] * 24}, ["layer_types has 'sliding_attention'", "no window"]),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 0}, ["num_experts_per_tok"]),
        (QWEN3_30B_A3B, {"n_shared_experts": 1}, ["n_shared_experts (which is 1)"]),
        (QWEN15_MOE_A27B, {"norm_topk_prob": "yes"}, ["norm_topk_prob must be true or false"]),
        (QWEN15_MOE_A27B, {"router_aux_loss_coef": -1.0}, ["router_aux_loss_coef", "-1.0"]),
        (OLMOE_1B_7B, {"clip_qkv": 8.0}, ["clip_qkv is 8.0, but no value of it is built for the olmoe family"]),
        (MIXTRAL_8X7B, {"sliding_window": 77, "layer_types": ["full_attention"] * 32}, ["layer_types is 'full_attention'"]),
        (MIXTRAL_8X7B, {"scoring_func": "sigmoid"}, ["scoring_func (which is 'sigmoid')"]),
    ],
)
def test_what_is_not_built_is_refused_by_field(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ConversionError) as caught:
        read_architecture(write(tmp_path, config, **changes))
    for text in (*named, str(tmp_path)):
        assert text in str(caught.value)
