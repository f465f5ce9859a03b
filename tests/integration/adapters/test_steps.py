"""Ten optimizer steps of the trainer on an adapter, against PEFT, transformers and torch's AdamW in float64."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rmipo.config.schema import OptimizerConfig
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin import adapters_off
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.step import train_step
from tests.harness import run_distributed
from tests.integration.adapters.dense import FORMS, Factors, PeftModel, dense_loss, write_model
from tests.integration.adapters.worlds import adapted_config, build_adapted, fill, stretches
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, build_batches, run_at_layouts, score_all

STEPS, PAIRS_A_STEP, NUM_PAIRS = 10, 4, 12
OPTIMIZER = OptimizerConfig(lr=2e-3, weight_decay=0.1, clip_grad=0.5, lr_decay_style="constant")
# Form -> learning rate of B over that of A.
RATIOS = {"dora": None, "phi3": 4.0}
SP_2: dict[str, Any] = {"tp": 2, "sequence_parallel": True, "tokens_per_microbatch": 120}
WORLDS = {
    1: [Case(name, model=name) for name in RATIOS],
    2: [Case(f"TP 2 SP, {name}", model=name, distributed_optimizer=True, overlap=True, **SP_2) for name in RATIOS]
    + [Case(f"DP 2, {name}", model=name, distributed_optimizer=True, tokens_per_microbatch=120) for name in RATIOS],
}


def rows_of(step: int) -> np.ndarray:
    return np.arange(step * PAIRS_A_STEP, (step + 1) * PAIRS_A_STEP) % NUM_PAIRS


def ours(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
    """The trainer's steps: losses, norms, and what this rank holds of the factors afterwards."""
    config = adapted_config(case)
    lora = dataclasses.replace(config.lora, lora_plus_ratio=RATIOS[case.model])
    state = build_adapted(case, Path(folder), groups, dataclasses.replace(config, lora=lora, optimizer=OPTIMIZER))
    fill(state, case, Path(folder), torch.load(Path(folder) / case.model / "factors.pt", weights_only=False), groups)
    objective, case = build_objective("dpo", {}), dataclasses.replace(case, objective="dpo")
    state.model.eval()
    with adapters_off(state.policy):
        pairs.reference_scores = score_all(case, state.policy, pairs, groups)
    batches = build_batches(case, pairs, state.policy, groups)
    outcomes = [train_step(state, batches.build(rows_of(step)), objective, groups) for step in range(STEPS)]
    pairs.reference_scores = None
    state.gather_parameters()
    losses = [float(outcome.metrics.values["loss"].double().mean()) for outcome in outcomes]
    return {"losses": losses, "norms": [outcome.grad_norm for outcome in outcomes], "stretches": stretches(state.policy)}


def theirs(dense: PeftModel, ratio: float | None) -> tuple[list[float], list[float], Factors]:
    """PEFT's: losses, norms, and the factors afterwards."""
    pairs, objective, losses, norms = make_pairs(NUM_PAIRS), build_objective("dpo", {}), [], []
    groups = []
    for name, parameter in dense.parameters():
        rate = OPTIMIZER.lr * (ratio or 1.0 if name.kind == "B" else 1.0)
        # Megatron decays no vectors.
        decay = 0.0 if name.kind == "magnitude" else OPTIMIZER.weight_decay
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    adam = torch.optim.AdamW(groups, betas=betas, eps=OPTIMIZER.adam_eps)
    parameters = [parameter for _, parameter in dense.parameters()]
    for step in range(STEPS):
        adam.zero_grad()
        loss = dense_loss(dense, [pairs[row] for row in rows_of(step)], objective)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_grad)))
        losses.append(float(loss.detach()))
        adam.step()
    return losses, norms, dense.factors()


@pytest.mark.dist
@pytest.mark.slow
def test_ten_steps_are_those_of_peft_and_torch(tmp_path: Path) -> None:
    expected, before = {}, {}
    for name, ratio in RATIOS.items():
        hf = write_model(tmp_path / name / "model", FORMS[name])
        dense = PeftModel(hf, FORMS[name])
        dense.draw()
        before[name] = dense.factors()
        torch.save(before[name], tmp_path / name / "factors.pt")
        expected[name] = theirs(dense, ratio)
    found: list[str] = []
    for world_size, cases in WORLDS.items():
        run = functools.partial(run_at_layouts, ours)
        for results in run_distributed(run, world_size, cases, str(tmp_path), collection(make_pairs(NUM_PAIRS))):
            for case, result in zip(cases, results, strict=True):
                losses, norms, factors = expected[case.model]
                assert result["losses"] == pytest.approx(losses, rel=1e-5), case.name
                assert result["norms"] == pytest.approx(norms, rel=1e-5), case.name
                for name, box, own in result["stretches"]:
                    whole, change = factors[name], factors[name] - before[case.model][name]
                    off: Tensor = (own.double() - whole[box]).norm()
                    if off > 1e-5 * whole.norm() or off > 1e-3 * change.norm():
                        found.append(
                            f"{case.name}: {name} {off / whole.norm():.1e} of it, {off / change.norm():.1e} of its change"
                        )
    assert found == []
