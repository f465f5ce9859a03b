"""Where a training step makes the host wait for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes import rows
from megatron_rmipo.runtime.groups import initialize_runtime
from megatron_rmipo.training.setup import build_training_state
from megatron_rmipo.training.step import evaluate_batch, train_step
from tests.harness import run_distributed
from tests.integration.problem import NUM_PAIRS, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, build_batches

# Megatron's own, of which newer versions have fewer: how many pairs there are, and the gradient's norm.
MEGATRONS = {
    "item megatron/core/distributed/finalize_model_grads.py:finalize_model_grads": 1,
    "item megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,
}
OURS = "copy to the host megatron_rmipo/passes/rows.py:gather_pairs"


def waits_of(hf_dir: str, objectives: list[str], spoiled: bool = False) -> dict[str, tuple[int, Counter[str], Counter[str]]]:
    """By objective: packs of a step, what it waited for, and what an evaluation waited for."""
    from tests.training.pretend_device import Waits, move, pretend

    groups = initialize_runtime()
    arch = read_architecture(hf_dir)
    cases = {name: Case(name, objective=name, tokens_per_microbatch=60) for name in objectives}
    models = {name: [build_model(arch, case.config(), groups) for _ in range(2)] for name, case in cases.items()}
    if spoiled:
        rows.to_device = lambda tensor: tensor.to(rows.current_device())  # type: ignore[attr-defined]
    mode = pretend()
    found = {}
    for name, case in cases.items():
        objective = build_objective(name, {})
        needs, pairs = objective.needs, collection(make_pairs())
        if needs.reference:
            pairs.reference_scores = [np.zeros((NUM_PAIRS, 2), dtype=np.float32)]  # type: ignore[list-item]
        if needs.mismatched:
            pairs.match_anew()
            assert pairs.mismatched is not None
            pairs.mismatched.reference_scores = pairs.reference_scores
        with mode, Waits():
            policy, reference = map(move, models[name])
            state = build_training_state(policy, case.config(), groups, train_iters=10)
        state.objective_state = objective.initial_state()
        state.reference = reference.requires_grad_(False).eval() if needs.perturbation is not None else None
        batch = build_batches(case, pairs, policy, groups).build(np.arange(8))
        with mode, Waits() as step:
            outcome = train_step(state, batch, objective, groups)
        assert outcome.updated
        with mode, Waits() as evaluation:
            evaluate_batch(state, batch, objective, groups)
        found[name] = (len(batch.conditional), step.found, evaluation.found)
    return found


@pytest.mark.dist
def test_a_step_waits_once_for_its_metrics_and_once_for_each_look_at_the_whole_batch(tmp_path: Path) -> None:
    looks = {"rmipo": 0, "dpo": 0, "epsilon_dpo": 0, "alpha_dpo": 1, "kto": 1}
    found = run_distributed(waits_of, 1, str(make_hf_model(tmp_path / "hf", layers=1)), list(looks))[0]
    for name, (num_packs, step, evaluation) in found.items():
        assert num_packs > 2, "so that a wait for each pack would show"
        assert step - Counter(MEGATRONS) == {OURS: 1 + looks[name]}, name
        assert evaluation == {OURS: 1 + looks[name]}, name


@pytest.mark.dist
def test_a_copy_that_waits_is_seen(tmp_path: Path) -> None:
    num_packs, step, _ = run_distributed(waits_of, 1, str(make_hf_model(tmp_path / "hf", layers=1)), ["simpo"], True)[0]["simpo"]
    assert step["copy from the host megatron_rmipo/passes/rows.py:on_device"] == num_packs
