"""Flags that save memory change neither loss nor gradients: 24 pairs against transformers in float64, as with the layouts."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from megatron.core.extensions import transformer_engine
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.layers.activation_offloading import IS_ANOTHER
from tests.integration.problem import make_pairs
from tests.integration.test_invariance import SPARSE, run_and_check
from tests.integration.worlds import Case, Result, run_cases

# Every tensor, however small; a step has passes without gradients before its rows, and these differ in length.
OFFLOADED: dict[str, Any] = {
    "fine_grained_activation_offloading": True,
    "offload_modules": ["attn_norm", "mlp_norm", "qkv_linear", "core_attn", "attn_proj"],
    "min_offloaded_tensor_size": 1,
}
SELECTIVE: dict[str, Any] = {"recompute": "selective", "tokens_per_microbatch": 200}
WORLDS = {
    1: [
        Case("norms and MLP recomputed", memory={"recompute_modules": ["layernorm", "mlp"]}, **SELECTIVE),
        Case("experts recomputed", model="mixtral", memory={"recompute_modules": ["core_attn", "moe", "layernorm"]}, **SELECTIVE),
        Case("activations on the host", memory=OFFLOADED, tokens_per_microbatch=120),
        Case("experts' activations on the host", model="mixtral", memory=OFFLOADED, tokens_per_microbatch=120),
    ],
    2: [
        Case("PP 2, activations on the host", pp=2, memory=OFFLOADED, tokens_per_microbatch=120),
        Case("CP 2, activations on the host", cp=2, memory=OFFLOADED, tokens_per_microbatch=120),
        Case("CP 2, all recomputed", cp=2, memory={"recompute_modules": ["core_attn", "layernorm", "mlp"]}, **SELECTIVE),
        Case(
            "TP 2, sequence parallel, all recomputed",
            tp=2,
            sequence_parallel=True,
            memory={"recompute_modules": ["core_attn", "layernorm", "mlp"]},
            **SELECTIVE,
        ),
        Case(
            "EP 2, experts recomputed",
            **SPARSE,
            objective="rmipo:0.7,kto:2",
            memory={"recompute_modules": ["layernorm", "moe"]},
            **SELECTIVE,
        ),
    ],
}
TWICE: dict[str, Any] = {"distributed_optimizer": True, "instances": 2, "tokens_per_microbatch": 120}
INSTANCES = [
    Case("DP 4, two instances", **TWICE),
    Case("DP 4, two instances, overlapped", overlap=True, **TWICE),
    Case("EP 2 x DP 2, two instances", **SPARSE, **TWICE),
    Case("CP 2 x DP 2, two instances", cp=2, overlap=True, **TWICE),
]


def run_offloading(cases: list[Case], folder: str, pairs: PairCollection) -> list[Result]:
    """As :func:`run_cases`, where Megatron-Core finds the switch of Transformer Engine that it turns while it offloads."""
    transformer_engine.cpu_offload = types.SimpleNamespace(CPUOffloadEnabled=False)
    results = run_cases(cases, folder, pairs)
    # What it knows is the rows of the last gradient pass that offloaded, not of all.
    packs = [result["packs"] for case, result in zip(cases, results, strict=True) if "offload_modules" in case.memory and result]
    known = PipelineOffloadManager.get_instance()._cached_chunks_forward
    assert not packs or len(known) == packs[-1]
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_same_loss_and_gradients(world_size: int, tmp_path: Path) -> None:
    cases = [case for case in WORLDS[world_size] if "offload_modules" not in case.memory or not IS_ANOTHER]
    run_and_check(cases, world_size, make_pairs(), tmp_path, run_offloading)


@pytest.mark.dist
def test_instances_of_the_distributed_optimizer_share_gradients(tmp_path: Path) -> None:
    pytest.importorskip("einops")
    run_and_check(INSTANCES, 4, make_pairs(), tmp_path)
