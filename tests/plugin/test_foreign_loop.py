"""Somebody else's GPTModel in a bare loop of Megatron's schedules gives the dense answer, however the batch is cut."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rmipo.objectives.registry import build_objective
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.test_invariance import check
from tests.plugin.foreign import ForeignCase, run_foreign

LAYOUTS = {
    1: [ForeignCase("TP 1"), ForeignCase("prompts not shared", share_prompts=False), ForeignCase("padded", padded=True)],
    2: [
        ForeignCase("TP 2, sequence parallel", tp=2, sequence_parallel=True),
        ForeignCase("PP 2", pp=2),
        ForeignCase("DP 2"),
        ForeignCase("padded, TP 2, sequence parallel", padded=True, tp=2, sequence_parallel=True),
        ForeignCase("padded, PP 2", padded=True, pp=2),
        ForeignCase("padded, PP 2, one shape", padded=True, pp=2, pad_to=35),
        ForeignCase("padded, DP 2, one shape", padded=True, pad_to=35),
    ],
}


def check_all(cases: list[ForeignCase], world_size: int, folder: Path) -> list[str | None]:
    """Compare each case with the dense answer; of refused ones the message."""
    pairs = make_pairs()
    problem = DenseProblem(make_hf_model(folder / "llama/model"), make_hf_model(folder / "llama/reference", seed=1), pairs)
    answers = {case.objective: problem.answer(build_objective(case.objective, case.options)) for case in cases}
    results = run_distributed(run_foreign, world_size, cases, str(folder), collection(pairs))[0]
    for case, result in zip(cases, results, strict=True):
        if not isinstance(result, str):
            check(case, result, answers[case.objective])
    return [result if isinstance(result, str) else None for result in results]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_same_loss_and_gradients_in_a_foreign_loop(world_size: int, tmp_path: Path) -> None:
    cases = [
        dataclasses.replace(case, objective=name, before_step=before_step)
        for name in ("rmipo", "simpo", "dpo", "kto")
        for case in LAYOUTS[world_size]
        for before_step in ((False, True) if name in ("rmipo", "kto") else (False,))
        if before_step or case.pp == 1 or name != "kto"
    ]
    assert check_all(cases, world_size, tmp_path) == [None] * len(cases)
