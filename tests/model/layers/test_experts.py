"""Layers of experts: what they compute beside transformers' own code, and what their routers count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from megatron_rmipo.config.schema import ExpertsConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import Experts, ModelArchitecture, Rope
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime

HIDDEN, FFN, NUM_TOKENS = 24, 10, 37
ARCH = ModelArchitecture(
    family="llama",
    num_layers=3,
    hidden_size=HIDDEN,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=53,
    max_position_embeddings=64,
    ropes=(Rope(1e4),),
    layernorm_epsilon=1e-5,
)
SOFTMAX = Experts(num_experts=6, per_token=2, ffn_hidden_size=FFN)
SIGMOID = Experts(
    num_experts=8,
    per_token=4,
    ffn_hidden_size=FFN,
    dense_layers=frozenset({0}),
    shared_ffn_hidden_size=14,
    score_function="sigmoid",
    score_bias=True,
    num_groups=4,
    groups_per_token=2,
    scaling=2.5,
)
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": 2}


@pytest.fixture
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def build(experts: Experts, groups: ProcessGroups, **flags: Any) -> PolicyModel:
    arch = dataclasses.replace(ARCH, experts=experts)
    return build_policy(arch, transformer_config(arch, groups, experts=ExpertsConfig(**flags)), groups)


def mixtral() -> tuple[Experts, torch.nn.Module]:
    return SOFTMAX, MixtralSparseMoeBlock(MixtralConfig(**SIZES, num_local_experts=6, intermediate_size=FFN))


def qwen3_moe() -> tuple[Experts, torch.nn.Module]:
    config = Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=FFN, norm_topk_prob=True)
    return SOFTMAX, Qwen3MoeSparseMoeBlock(config)


def olmoe() -> tuple[Experts, torch.nn.Module]:
    config = OlmoeConfig(**SIZES, num_experts=6, intermediate_size=FFN, norm_topk_prob=False)
    return dataclasses.replace(SOFTMAX, normalized=False), OlmoeSparseMoeBlock(config)


def deepseek_v3() -> tuple[Experts, torch.nn.Module]:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_experts_per_tok=4,
        n_routed_experts=8,
        moe_intermediate_size=FFN,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    return dataclasses.replace(SIGMOID, shared_ffn_hidden_size=2 * FFN), DeepseekV3MoE(config)


def copy_weights(source: Any, layer: Any) -> None:
    """The weights of transformers' block to Megatron's layer."""
    layer.router.weight.data.copy_(source.gate.weight)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(source.gate.e_score_correction_bias)
        layer.shared_experts.linear_fc1.weight.data.copy_(
            torch.cat([source.shared_experts.gate_proj.weight, source.shared_experts.up_proj.weight])
        )
        layer.shared_experts.linear_fc2.weight.data.copy_(source.shared_experts.down_proj.weight)
    for number, expert in enumerate(layer.experts.local_experts):
        expert.linear_fc1.weight.data.copy_(source.experts.gate_up_proj[number])
        expert.linear_fc2.weight.data.copy_(source.experts.down_proj[number])


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, olmoe, deepseek_v3])
def test_a_layer_of_experts_computes_what_transformers_does(family: Any, groups: ProcessGroups) -> None:
    experts, theirs = family()
    generator = torch.Generator().manual_seed(5)
    for tensor in [*theirs.parameters(), *theirs.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    ours: Any = build(experts, groups, moe_router_dtype="fp64").decoder.layers[1].mlp.double()
    copy_weights(theirs, ours)
    hidden = torch.randn(NUM_TOKENS, 1, HIDDEN, generator=generator, dtype=torch.float64)
    outputs, gradients = [], []
    for module, shape in ((theirs, (1, NUM_TOKENS, HIDDEN)), (ours, (NUM_TOKENS, 1, HIDDEN))):
        given = hidden.clone().requires_grad_()
        result: Tensor | tuple[Tensor, Any] = module(given.view(shape))
        output = result if isinstance(result, Tensor) else result[0]
        output.square().sum().backward()
        outputs.append(output.flatten())
        gradients.append([given.grad, (module.gate if module is theirs else module.router).weight.grad])
    # The scores are fp32 in both.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-4)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 1e-5 * one.norm()


def test_experts_with_biases_compute_what_those_of_gpt_oss_do(groups: ProcessGroups) -> None:
    config = GptOssConfig(**SIZES, num_local_experts=6, intermediate_size=FFN, swiglu_limit=0.7)
    config._experts_implementation = "eager"
    theirs: Any = GptOssMLP(config)
    generator = torch.Generator().manual_seed(5)
    for tensor in theirs.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    experts = dataclasses.replace(SOFTMAX, router_bias=True, bias=True)
    arch = dataclasses.replace(ARCH, experts=experts, activation="clamped_swiglu", activation_limit=0.7)
    flags = transformer_config(arch, groups, experts=ExpertsConfig(moe_router_dtype="fp64"))
    ours: Any = build_policy(arch, flags, groups).decoder.layers[1].mlp.double()
    ours.router.weight.data.copy_(theirs.router.weight)
    ours.router.bias.data.copy_(theirs.router.bias)
    for number, expert in enumerate(ours.experts.local_experts):
        in_turns, bias = theirs.experts.gate_up_proj[number], theirs.experts.gate_up_proj_bias[number]
        expert.linear_fc1.weight.data.copy_(torch.cat([in_turns[:, ::2], in_turns[:, 1::2]], dim=1).T)
        expert.linear_fc1.bias.data.copy_(torch.cat([bias[::2], bias[1::2]]))
        expert.linear_fc2.weight.data.copy_(theirs.experts.down_proj[number].T)
        expert.linear_fc2.bias.data.copy_(theirs.experts.down_proj_bias[number])
    hidden = torch.randn(NUM_TOKENS, 1, HIDDEN, generator=generator, dtype=torch.float64)
    found, expected = ours(hidden)[0].flatten(), theirs(hidden.view(1, NUM_TOKENS, HIDDEN))[0].flatten()
    # Megatron's softmax is in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    found.square().sum().backward()
    expected.square().sum().backward()
    bias_gradient = torch.stack([expert.linear_fc2.bias.grad for expert in ours.experts.local_experts])
    for one, other in ((bias_gradient, theirs.experts.down_proj_bias.grad), (ours.router.bias.grad, theirs.router.bias.grad)):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_only_layers_that_have_experts_get_them(groups: ProcessGroups) -> None:
    layers: Any = build(SIGMOID, groups).decoder.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True, True]
    assert layers[0].mlp.linear_fc1.weight.shape == (2 * ARCH.ffn_hidden_size, HIDDEN)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score_function": "sigmoid", "normalized": False}, "not normalized"),
        ({"per_token": 1}, "never learns"),
        ({"score_bias": True}, "beside softmax"),
        ({"num_groups": 3, "groups_per_token": 2}, "groups of experts"),
        ({"per_token": 7}, "7 of 6"),
    ],
)
def test_routers_that_megatron_computes_otherwise_are_refused(
    changes: dict[str, Any], reason: str, groups: ProcessGroups
) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(dataclasses.replace(SOFTMAX, **changes), groups)
