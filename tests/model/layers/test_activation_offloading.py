"""Activations on the host: what is kept where, step after step of other rows, and which modules there are."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.layers import activation_offloading
from megatron_rmipo.model.layers.activation_offloading import IS_ANOTHER, begin_gradient_pass, offload_module_problems
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, build_batches
from tests.training.test_validation import ARCH, SPARSE

# Module -> numbers a token and layer that go to the host, in hidden sizes: the input of a norm twice (its own, and in fp32) with
# what it gives; the input of the projections; queries, keys, values and what attention gives of each segment.
NUMBERS = {"attn_norm": (3.0, 3.1), "qkv_linear": (1.0, 1.0), "core_attn": (4.0, 6.0)}


def on_host() -> int:
    """Bytes of the current row that are on the host."""
    chunk = PipelineOffloadManager.get_instance().cur_forward_chunk()
    held = [state for group in chunk.offload_groups for state in group._tensors.values() if isinstance(state, tuple)]
    return sum(state[1].nbytes for state in held)


@pytest.mark.skipif(IS_ANOTHER, reason="refused with this megatron-core")
@pytest.mark.parametrize("module", NUMBERS)
def test_inputs_go_to_the_host_whatever_the_rows(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "cpu_offload", types.SimpleNamespace(CPUOffloadEnabled=False))
    groups = initialize_runtime()
    hf = write_hf_model(tmp_path, "llama2")
    memory = MemoryConfig(fine_grained_activation_offloading=True, offload_modules=[module], min_offloaded_tensor_size=1)  # type: ignore[list-item]
    arch = read_architecture(hf)
    policy = build_model(arch, Config(model=ModelConfig(make_vocab_size_divisible_by=8), memory=memory), groups)
    load_hf_weights(policy, hf, arch, groups=groups)
    rows = build_batches(Case("rows", tokens_per_microbatch=120), collection(make_pairs()), policy, groups).build(np.arange(8))
    least, most = NUMBERS[module]
    (model,) = policy
    # More rows than in the first step, and less.
    for count in (1, 3, 2):
        begin_gradient_pass(model)
        for row in rows.conditional[:count]:
            arguments = (row.token_ids, row.position_ids, row.segments, row.source, row.target)
            with torch.no_grad():
                expected = model(*arguments)
            scores = model(*arguments)
            assert torch.equal(scores, expected)
            assert least <= on_host() / (4 * row.token_ids.numel() * arch.num_layers * arch.hidden_size) <= most
            scores.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    shutdown_runtime()


def test_modules_that_a_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(arch: object, *modules: str, **model: str) -> list[str]:
        memory = MemoryConfig(offload_modules=list(modules))  # type: ignore[arg-type]
        return list(offload_module_problems(Config(model=ModelConfig(**model), memory=memory), arch))  # type: ignore[arg-type]

    assert not refused(ARCH, "attn_norm", "mlp_norm", "qkv_linear", "core_attn", "attn_proj")
    assert not refused(SPARSE, "mlp_norm")
    (problem,) = refused(ARCH, "expert_fc1")
    assert "expert_fc1: this model has no experts; would work: attn_norm qkv_linear core_attn attn_proj mlp_norm" in problem
    assert "moe_act: needs --moe-grouped-gemm" in refused(SPARSE, "moe_act")[0]
    assert "--recompute-modules core_attn computes it anew" in refused(ARCH, "core_attn", recompute_granularity="selective")[0]
    assert "no norms before" in refused(dataclasses.replace(ARCH, pre_norm=False), "attn_norm")[0]
    monkeypatch.setattr(activation_offloading, "transformer_engine_layers", lambda model: True)
    assert "part of the linear layer" in refused(ARCH, "mlp_norm")[0]
    assert not refused(SPARSE, "mlp_norm")
