"""Every objective gives the same loss and gradients however the global batch is cut, against transformers in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.runtime.groups import initialize_runtime
from megatron_rmipo.training.step import train_step
from tests.harness import run_distributed
from tests.integration.problem import collection, make_hf_model, make_pairs, unpaired
from tests.integration.test_invariance import run_and_check
from tests.integration.worlds import Case, build_batches, build_reference, build_state

# Perturbations large enough that no pair's step hangs on rounding.
OPTIONS: dict[str, dict[str, Any]] = {"epsilon_dpo": {"epsilon": 0.2}}
# Other forms of objectives that depend on the batch, besides the defaults.
FORMS = {
    "alpha_dpo": {"preset": "official"},
    "beta_dpo": {"filter_pairs": False, "ema_bias_correction": False},
    "dpo": {"pair_margin": True, "pair_beta": True, "log_ratio_normalization": "mean"},
    "ipo": {"log_ratio_normalization": "mean"},
    "simper": {"length_normalization": False},
    # Several at once: every kind of pass, and a reference in memory for one that reads kept log-probs when it is alone.
    "rmipo:0.7,kto:2,beta_dpo:0.5": {},
    "sft:0.2,dpo,epsilon_dpo:0.5": {"epsilon": 0.2},
}
LAYOUTS = {
    1: [{"tokens_per_microbatch": 48}],
    2: [{"tp": 2, "tokens_per_microbatch": 120}, {"pp": 2, "tokens_per_microbatch": 120}, {"tokens_per_microbatch": 120}],
    4: [{"tp": 2, "pp": 2, "sequence_parallel": True, "tokens_per_microbatch": 120}],
}


def cases_of(options: dict[str, dict[str, Any]], world_size: int) -> list[Case]:
    """Each objective with its options at every layout of so many ranks."""
    return [
        Case(f"{name} {given} {layout}", objective=name, options=given, **layout)
        for name, given in options.items()
        for layout in LAYOUTS[world_size]
    ]


def one_of_each_kind() -> list[str]:
    """Of objectives that need the same and carry the same, the first: the others differ in a function of numbers."""
    kinds: dict[str, str] = {}
    for name in OBJECTIVES:
        objective = build_objective(name, OPTIONS.get(name, {}))
        kinds.setdefault(f"{objective.needs} {sorted(objective.initial_state())}", name)
    return list(kinds.values())


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_every_objective_is_the_same_at_every_layout(world_size: int, tmp_path: Path) -> None:
    names = list(OBJECTIVES) if world_size < 4 else one_of_each_kind()
    run_and_check(cases_of({name: OPTIONS.get(name, {}) for name in names}, world_size), world_size, make_pairs(), tmp_path)


@pytest.mark.dist
def test_other_forms_are_the_same_at_every_layout(tmp_path: Path) -> None:
    run_and_check(cases_of(FORMS, 2), 2, make_pairs(), tmp_path)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_unpaired_rows_are_the_same_at_every_layout(world_size: int, tmp_path: Path) -> None:
    options = {name: OPTIONS.get(name, {}) for name, objective in OBJECTIVES.items() if objective().needs.unpaired}
    run_and_check(cases_of(options, world_size), world_size, unpaired(make_pairs()), tmp_path)


# Forward passes of the policy and of the reference over the batch in one step, all its rows in one pack; with dpo and its kin the
# reference was asked before.
PASSES = {
    "rmipo": (2, 0),
    "kto": (2, 0),
    "alpha_dpo": (2, 0),
    "beta_dpo": (2, 0),
    "bco_pair": (2, 0),
    "aot_pair": (2, 0),
    "epsilon_dpo": (1, 1),
    "amapo": (2, 0),
    "gamma_po": (2, 0),
}


def _note(calls: list[str], name: str, *_: object) -> None:
    calls.append(name)


def count_passes(hf_dir: str) -> dict[str, tuple[tuple[int, int], int]]:
    """By objective: passes of (policy, reference) in a training step, and scored tokens of the gradient pass."""
    groups = initialize_runtime()
    pairs, counts = make_pairs(), {}
    for name in OBJECTIVES:
        objective, case = build_objective(name, {}), Case(name, objective=name)
        rows = collection(pairs)
        if objective.needs.reference:
            rows.reference_scores = [np.full((len(pairs), 2), -20.0, dtype=np.float32)]
        if objective.needs.mismatched:
            rows.match_anew()
            assert rows.mismatched is not None
            rows.mismatched.reference_scores = rows.reference_scores
        state = build_state(case, Path(hf_dir), groups)
        calls: list[str] = []
        if objective.needs.perturbation is not None:
            state.reference = build_reference(case, Path(hf_dir), groups)
            state.reference[0].register_forward_pre_hook(partial(_note, calls, "reference"))
        state.policy[0].register_forward_pre_hook(partial(_note, calls, "policy"))
        state.objective_state = objective.initial_state()
        batch = build_batches(case, rows, state.policy, groups).build(np.arange(len(pairs)))
        train_step(state, batch, objective, groups)
        counts[name] = ((calls.count("policy"), calls.count("reference")), sum(row.num_scored for row in batch.conditional))
    return counts


@pytest.mark.dist
def test_nothing_is_computed_that_nobody_asked_for(tmp_path: Path) -> None:
    pairs = make_pairs()
    counts = run_distributed(count_passes, 1, str(make_hf_model(tmp_path / "model")))[0]
    chosen, rejected = sum(p.chosen.size for p in pairs), sum(p.rejected.size for p in pairs)
    for name in OBJECTIVES:
        scored = chosen if name == "sft" else chosen + rejected
        assert counts[name] == (PASSES.get(name, (1, 0)), scored), name
