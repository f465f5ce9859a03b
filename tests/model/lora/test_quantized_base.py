"""A model whose frozen layers are quantized beside one whose weights are what those are dequantized to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.errors import ConfigError, ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.lora.attach import add_adapters, low_ranks
from megatron_rmipo.model.lora.plan import plan_of_flags
from megatron_rmipo.model.lora.quantized import QuantizedKind, QuantizedWeight, frozen_weight
from megatron_rmipo.model.lora.quantized_base import quantize_base
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.plugin import adapters_off
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed
from tests.model.lora.test_quantized import KINDS, needs_bitsandbytes

_COMMON: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "initializer_range": 0.1}
# Kind -> sizes whose parts on two ranks are whole blocks, and how many of a decoder's linear layers are quantized.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3": ({**_COMMON, "num_hidden_layers": 2, "head_dim": 32}, 2 * 4),
    "mixtral": ({**_COMMON, "num_hidden_layers": 2, "num_local_experts": 3}, 2 * (2 + 3 * 2)),
    "deepseek_v3": (
        {
            **{**_COMMON, "num_hidden_layers": 2, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64},
            **{"v_head_dim": 32, "first_k_dense_replace": 1, "moe_intermediate_size": 128, "n_routed_experts": 3},
            **{"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        },
        # Projections of latents; a dense MLP, experts and one that all tokens go through.
        2 * 5 + 2 + (3 + 1) * 2,
    ),
}
TOKENS = 12


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def write(directory: Path, kind: str) -> Path:
    return write_hf_model(directory, kind, **MODELS[kind][0])


def build(hf: Path, groups: ProcessGroups, dtype: torch.dtype = torch.float32, **flags: Any) -> PolicyModel:
    """This rank's part of the model with new adapters."""
    arch = read_architecture(hf)
    config = transformer_config(arch, groups, dtype=dtype, sequence_parallel=groups.tp_size > 1)
    model = build_policy(arch, config, groups, make_vocab_size_divisible_by=8, chunk_size=16)
    load_hf_weights(model, hf, arch, groups=groups)
    add_adapters(model, arch, {ADAPTER: plan_of_flags(arch, LoraConfig(lora_rank=3, **flags))}, groups, seed=5)
    return model


def change(model: PolicyModel) -> None:
    """Have adapters change something, the same at any layout."""
    for _, _, adapter in low_ranks(model):
        for part in adapter.parts:
            part.linear_out.weight.data.fill_(0.02)


def quantized_layers(model: PolicyModel) -> dict[str, Any]:
    found: dict[str, Any] = dict(model.named_modules())
    return {name: module for name, module in found.items() if isinstance(getattr(module, "weight", None), QuantizedWeight)}


def scores(model: PolicyModel) -> Tensor:
    token_ids = torch.randint(3, 200, (TOKENS,), generator=torch.Generator().manual_seed(1))
    source = torch.arange(4, TOKENS - 1)
    logps: Tensor = model(token_ids, torch.arange(TOKENS), torch.tensor([[0, TOKENS, 0, 0]]), source, token_ids[source + 1])
    return logps


class Outcome(NamedTuple):
    """Log-probs, and the gradients of their sum."""

    logps: Tensor
    gradients: dict[str, Tensor]


def outcome(model: PolicyModel) -> Outcome:
    logps = scores(model)
    logps.sum().backward()
    grads = {name: one.grad for name, one in model.named_parameters() if one.requires_grad and one.grad is not None}
    return Outcome(logps.detach(), grads)


def both(hf: Path, tp_size: int, kind: QuantizedKind, flags: dict[str, Any]) -> tuple[Outcome, Outcome]:
    """Of the quantized model, and of one with the dequantized weights."""
    groups = initialize_runtime(tensor_model_parallel_size=tp_size)
    quantized, dense = build(hf, groups, **flags), build(hf, groups, **flags)
    quantize_base(quantized, kind)
    by_name: dict[str, Any] = dict(dense.named_modules())
    for name, layer in quantized_layers(quantized).items():
        by_name[name].weight.data.copy_(frozen_weight(layer))
    for (_, layer, adapter), (_, _, other) in zip(low_ranks(dense), low_ranks(quantized), strict=True):
        if adapter.has_lengths:
            adapter.set_lengths(adapter.row_lengths(layer.weight))
            for mine, its in zip(adapter.parts, other.parts, strict=True):
                assert mine.magnitude is not None
                assert its.magnitude is not None
                assert torch.equal(mine.magnitude.weight, its.magnitude.weight)
    change(quantized)
    change(dense)
    found = outcome(quantized), outcome(dense)
    shutdown_runtime()
    return found


@needs_bitsandbytes
@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "kind", "flags"),
    [
        ("qwen3", "nf4", {}),
        ("qwen3", "nf4", {"use_dora": True}),
        ("mixtral", "int8", {}),
        ("deepseek_v3", "nf4", {}),
    ],
)
def test_it_computes_what_the_dequantized_model_does_at_any_layout(
    model: str, kind: QuantizedKind, flags: dict[str, Any], tmp_path: Path
) -> None:
    hf = write(tmp_path, model)
    whole: Outcome | None = None
    for tp_size in (1, 2):
        for quantized, dense in run_distributed(both, tp_size, hf, tp_size, kind, flags):
            torch.testing.assert_close(quantized.logps, dense.logps, rtol=1e-6, atol=1e-6)
            assert quantized.gradients.keys() == dense.gradients.keys()
            assert all(".adapter." in name for name in quantized.gradients)
            for name, gradient in quantized.gradients.items():
                expected = dense.gradients[name]
                torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))
            whole = whole or quantized
            torch.testing.assert_close(quantized.logps, whole.logps, rtol=1e-5, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_linear_layers_of_the_decoder_alone_are_quantized(
    model: str, kind: QuantizedKind, groups: ProcessGroups, tmp_path: Path
) -> None:
    policy = build(write(tmp_path, model), groups, torch.bfloat16)
    matrices = {name: one for name, one in policy.named_parameters() if one.dim() == 2 and not one.requires_grad}
    quantize_base(policy, kind)
    layers, left = quantized_layers(policy), {name for name, _ in policy.named_parameters()}
    assert len(layers) == MODELS[model][1]
    assert all(name.startswith("decoder.") for name in layers)
    others = [name for name in matrices if name in left]
    assert {f"{name}.weight" for name in layers} == matrices.keys() - set(others)
    assert all("embedding" in name or "output_layer" in name or "router" in name for name in others)
    # bf16 took two bytes a number.
    before = sum(2 * matrices[f"{name}.weight"].numel() for name in layers)
    after = sum(one.numel() * one.element_size() for layer in layers.values() for one in layer.weight.buffers())
    assert after == before * {"nf4": 4.5, "int8": 8.5}[kind] / 16
    assert torch.isfinite(scores(policy)).all()


@needs_bitsandbytes
@pytest.mark.parametrize("flags", [{}, {"use_dora": True}])
def test_a_new_adapter_changes_nothing(flags: dict[str, Any], groups: ProcessGroups, tmp_path: Path) -> None:
    policy = build(write(tmp_path, "qwen3"), groups, **flags)
    as_it_was = scores(policy)
    quantize_base(policy, "nf4")
    with torch.no_grad(), adapters_off(policy):
        without = scores(policy)
    assert float((without - as_it_was).abs().max()) > 1e-3
    torch.testing.assert_close(scores(policy).detach(), without, rtol=1e-6, atol=1e-6)


@needs_bitsandbytes
def test_what_is_trained_whole_stays(groups: ProcessGroups, tmp_path: Path) -> None:
    flags = {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["o_proj"]}
    policy = build(write(tmp_path, "qwen3"), groups, **flags)
    quantize_base(policy, "int8")
    assert not [name for name in quantized_layers(policy) if "linear_proj" in name]
    assert any("linear_proj.weight" in name for name in outcome(policy).gradients)


@needs_bitsandbytes
def test_its_weights_are_not_written_as_a_model(groups: ProcessGroups, tmp_path: Path) -> None:
    hf = write(tmp_path / "hf", "qwen3")
    policy = build(hf, groups)
    quantize_base(policy, "nf4")
    assert not [name for name in policy.state_dict() if "linear_qkv.weight" in name]
    with pytest.raises(ConversionError):
        export_hf(policy, read_architecture(hf), hf, tmp_path / "written", dtype=None, groups=groups)


@needs_bitsandbytes
def test_rows_that_are_no_whole_blocks_are_refused_before_anything_changes(groups: ProcessGroups, tmp_path: Path) -> None:
    policy = build(write_hf_model(tmp_path, "qwen3", **{**MODELS["qwen3"][0], "intermediate_size": 160}), groups)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.linear_fc2 are 160 numbers on a rank.* blocks of 64"):
        quantize_base(policy, "nf4")
    assert not quantized_layers(policy)


def test_layers_of_transformer_engine_are_refused_by_name(groups: ProcessGroups, tmp_path: Path) -> None:
    class TEColumnParallelLinear(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)

    policy = build(write(tmp_path, "qwen3"), groups)
    attention: Any = policy.decoder.layers[0].self_attention
    assert type(attention.linear_qkv) is ColumnParallelLinear
    attention.linear_qkv = TEColumnParallelLinear(attention.linear_qkv.weight.detach())
    with pytest.raises(ConfigError, match=r"linear_qkv is Transformer Engine's TEColumn.*--transformer-impl local"):
        quantize_base(policy, "int8")


def test_without_bitsandbytes_nothing_changes(groups: ProcessGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    policy = build(write(tmp_path, "qwen3"), groups)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        quantize_base(policy, "nf4")
    assert not quantized_layers(policy)


@needs_bitsandbytes
def test_a_device_without_kernels_is_refused(groups: ProcessGroups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel\nat all")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    with pytest.raises(ConfigError, match=r"cannot quantize on cpu here \(no kernel\)"):
        quantize_base(build(write(tmp_path, "qwen3"), groups), "nf4")
