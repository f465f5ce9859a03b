"""Loss, gradients and their norm of adapters at every layout, against PEFT and transformers in float64."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.registry import build_objective
from tests.harness import run_distributed
from tests.integration.adapters.dense import FORMS, PeftModel, answers, write_changed, write_model
from tests.integration.adapters.worlds import OBJECTIVES, compare_with_peft, epsilon_dpo
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, run_at_layouts

NUM_PAIRS = 8
VPP: dict[str, Any] = {"pp": 2, "split": {"num_layers_per_virtual_pipeline_stage": 1}, "tokens_per_microbatch": 120}
SP_2: dict[str, Any] = {"tp": 2, "sequence_parallel": True, "tokens_per_microbatch": 150}
EP_2: dict[str, Any] = {"ep": 2, "tokens_per_microbatch": 120}
SHARDED: dict[str, Any] = {"distributed_optimizer": True, "overlap": True, "tokens_per_microbatch": 120}
WORLDS: dict[int, list[Case]] = {
    1: [
        *[Case(name, model=name, tokens_per_microbatch=150) for name in FORMS],
        Case("full recomputation", model="dora", recompute="full", tokens_per_microbatch=150),
        Case("bf16", model="dora", bf16=True, tokens_per_microbatch=150),
    ],
    2: [
        Case("TP 2", model="llama", tp=2, tokens_per_microbatch=150),
        Case("TP 2, lengths", model="dora", tp=2),
        *[Case(f"TP 2 SP, {name}", model=name, **SP_2) for name in FORMS],
        Case("TP 2 SP, recomputation", model="llama", recompute="full", **SP_2),
        Case("TP 2 SP, bf16", model="dora", bf16=True, **SP_2),
        Case("PP 2, recomputation", model="whole modules", pp=2, recompute="full", tokens_per_microbatch=120),
        Case("PP 2", model="experts", pp=2, tokens_per_microbatch=120),
        Case("PP 2 x VPP 2", model="llama", **VPP),
        Case("CP 2", model="dora", cp=2, tokens_per_microbatch=150),
        Case("CP 2, experts", model="shared", cp=2, tokens_per_microbatch=150),
        Case("DP 2", model="whole modules", **SHARDED),
        Case("DP 2, bf16", model="llama", bf16=True, **SHARDED),
        *[Case(f"EP 2, {name}", model=name, **EP_2) for name in ("experts", "shared", "latent")],
        Case("EP 2, sharded optimizer", model="experts", ep=2, **SHARDED),
        *[Case(f"TP 2 SP, each rank all {name} whole", model=name, etp=1, **SP_2) for name in ("experts", "shared")],
    ],
    4: [
        Case("TP 2 SP x PP 2", model="llama", pp=2, **SP_2),
        Case("TP 2 SP x PP 2, whole modules", model="whole modules", pp=2, **SP_2),
        Case("TP 4 of 2 groups", model="llama", tp=4, tokens_per_microbatch=150),
        Case("TP 4 SP of 2 groups, lengths", model="dora", **{**SP_2, "tp": 4}),
        Case("EP 2 x TP 2 SP", model="experts", ep=2, etp=2, **SP_2),
        Case("EP 2 x TP 2 SP, shared", model="shared", ep=2, etp=2, **SP_2),
        *[Case(f"EP 2, TP 2 SP, {name} whole", model=name, ep=2, etp=1, **SP_2) for name in ("latent", "experts", "shared")],
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each form the model, factors of an adapter that has learned, and PEFT's answers."""
    where = tmp_path_factory.mktemp("adapters")
    for name, form in FORMS.items():
        hf = write_model(where / name / "model", form)
        dense = PeftModel(hf, form)
        dense.draw()
        torch.save(dense.factors(), where / name / "factors.pt")
        if changed := dense.modules():
            write_changed(hf, where / name / "changed", changed)
        objectives = {objective: build_objective(objective, {}) for objective in OBJECTIVES}
        if name == "llama":
            objectives["epsilon_dpo"] = build_objective("epsilon_dpo", {"epsilon": 0.2})
        for objective, answer in answers(dense, make_pairs(NUM_PAIRS), objectives).items():
            torch.save(answer, where / name / f"{objective}.pt")
            if answer.modules:
                write_changed(hf, where / name / f"{objective} gradients", answer.modules)
    return where


def faults(case: Case, result: dict[str, Any]) -> list[str]:
    """What of a rank's result is not as it should be."""
    first = float((result["first"] - math.log(2)).abs().max())
    found = [f"first loss of dpo off by {first}"] if first > 1e-6 else []
    for objective in OBJECTIVES if not case.bf16 else ():
        off = result[objective]
        worst = max(off["errors"], key=off["errors"].get)
        if abs(off["loss"]) > 1e-5 or abs(off["norm"]) > 1e-5 or off["errors"][worst] > 1e-5:
            found.append(f"{objective}: loss {off['loss']:.1e}, norm {off['norm']:.1e}, {worst} {off['errors'][worst]:.1e}")
    return [f"{case.name}: {fault}" for fault in found]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_adapters_are_those_of_peft_at_every_layout(world_size: int, folder: Path) -> None:
    run = functools.partial(run_at_layouts, compare_with_peft)
    ranks = run_distributed(run, world_size, WORLDS[world_size], str(folder), collection(make_pairs(NUM_PAIRS)))
    found: list[str] = []
    for results in ranks:
        for case, result in zip(WORLDS[world_size], results, strict=True):
            found += faults(case, result)
    assert found == []


@pytest.mark.dist
def test_the_reference_in_memory_is_the_model_without_its_adapter(folder: Path) -> None:
    cases = [Case("TP 2 SP", model="llama", **SP_2), Case("PP 2", model="llama", pp=2, tokens_per_microbatch=120)]
    run = functools.partial(run_at_layouts, epsilon_dpo)
    for results in run_distributed(run, 2, cases, str(folder), collection(make_pairs(NUM_PAIRS))):
        for case, result in zip(cases, results, strict=True):
            assert result["same"], case.name
            assert abs(result["loss"]) < 1e-5, case.name
            assert max(result["errors"].values()) < 1e-5, case.name
