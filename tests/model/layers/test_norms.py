"""Norms in each place of a layer, against dense float64, and the names they have in checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.families.tensors import megatron_shape, rules_of
from megatron_rmipo.model.layers.norms import RMSNorm
from tests.harness import run_distributed

CONFIG: Any = SimpleNamespace(
    use_cpu_initialization=True, params_dtype=torch.float32, sequence_parallel=False, layernorm_zero_centered_gamma=True
)
EPS = 1e-2  # large enough to be seen
ARCH = ModelArchitecture(
    family="olmo2",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=53,
    max_position_embeddings=64,
    ropes=(Rope(1e4),),
    layernorm_epsilon=EPS,
    qk_norm_whole=True,
    pre_norm=False,
    post_norm=True,
)


def dense(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden * weight / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt()


def test_a_zero_centred_norm_adds_its_one_in_fp32() -> None:
    torch.manual_seed(3)
    norm = RMSNorm(CONFIG, 7, EPS)
    assert not norm.weight.any()
    norm.weight.data = torch.randn(7).mul(0.01).bfloat16()
    hidden = torch.randn(5, 7).bfloat16()
    expected = dense(hidden.double(), 1.0 + norm.weight.double()).bfloat16()
    assert torch.equal(norm(hidden), expected)
    assert not torch.equal(dense(hidden.double(), (1.0 + norm.weight).double()).bfloat16(), expected), "bf16 cannot say it"


@pytest.mark.dist
def test_a_norm_of_all_heads_is_that_of_one_rank() -> None:
    (output, input_grad, weight_grad, weight), second = run_distributed(norm_all_heads, 2)
    heads, upstream = inputs()
    heads.requires_grad_()
    whole = torch.cat([weight, second[3]]).requires_grad_()
    expected = dense(heads.flatten(-2), whole).view(heads.shape)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(torch.cat([output, second[0]], dim=2), expected)
    torch.testing.assert_close(torch.cat([input_grad, second[1]], dim=2), heads.grad)
    torch.testing.assert_close(torch.cat([weight_grad, second[2]]), whole.grad)


def inputs() -> tuple[Tensor, Tensor]:
    """Heads ``[5, 1, 6, 3]`` and the gradient of what comes of them, fp64."""
    random = torch.Generator().manual_seed(5)
    heads, upstream = (torch.randn(5, 1, 6, 3, generator=random, dtype=torch.float64) for _ in range(2))
    return heads, upstream


def norm_all_heads() -> tuple[Tensor, ...]:
    """What a rank of two makes of its half of the heads."""
    from megatron_rmipo.model.layers.norms import WholeNorm
    from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime

    groups = initialize_runtime(tensor_model_parallel_size=2)
    heads, upstream = (tensor.chunk(2, dim=2)[groups.tp_rank].clone() for tensor in inputs())
    config: Any = SimpleNamespace(use_cpu_initialization=True, params_dtype=torch.float64)
    norm = WholeNorm(config, 9, EPS, groups.tp)
    torch.manual_seed(groups.tp_rank)
    norm.weight.data.uniform_(0.5, 1.5)
    heads.requires_grad_()
    output = norm(heads)
    (output * upstream).sum().backward()
    assert heads.grad is not None
    assert norm.weight.grad is not None
    result = output.detach(), heads.grad, norm.weight.grad, norm.weight.detach()
    shutdown_runtime()
    return result


@pytest.mark.dist
def test_checkpoints_hold_norms_by_the_names_and_shapes_of_the_family() -> None:
    held = run_distributed(sharded_shapes, 2)
    expected = {
        rule.megatron: (ARCH.num_layers, *megatron_shape(rule, ARCH)) for rule in rules_of(ARCH) if "norm.weight" in rule.megatron
    }
    assert len(expected) == 5
    expected["decoder.final_layernorm.weight"] = (ARCH.hidden_size,)
    for shapes, _ in held:
        assert shapes == expected
    cut = ["decoder.layers.self_attention.q_layernorm.weight", "decoder.layers.self_attention.k_layernorm.weight"]
    assert [[offsets[name] for name in cut] for _, offsets in held] == [[0, 0], [18, 6]]


def sharded_shapes() -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes of the norms in a checkpoint, and where this rank's part of each begins."""
    from megatron_rmipo.model.build import build_policy
    from megatron_rmipo.model.megatron_config import transformer_config
    from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime

    groups = initialize_runtime(tensor_model_parallel_size=2)
    model = build_policy(ARCH, transformer_config(ARCH, groups), groups)
    state = model.sharded_state_dict()
    norms = [item for item in state.values() if item.key.endswith("norm.weight")]
    shapes = {item.key: tuple(item.global_shape) for item in norms}
    offsets = {item.key: int(item.global_offset[-1]) for item in norms}
    shutdown_runtime()
    return shapes, offsets
