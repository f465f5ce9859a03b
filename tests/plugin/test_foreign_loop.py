"""Somebody else's GPTModel in a bare loop of Megatron's schedules gives the dense answer, however the batch is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rmipo.objectives.registry import build_objective
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.test_invariance import check
from tests.integration.worlds import Case
from tests.plugin.foreign import run_foreign

OBJECTIVES = ("rmipo", "simpo", "dpo", "kto")
LAYOUTS = {
    1: [Case("TP 1"), Case("prompts not shared", share_prompts=False)],
    2: [Case("TP 2, sequence parallel", tp=2, sequence_parallel=True), Case("PP 2", pp=2), Case("DP 2")],
}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_same_loss_and_gradients_in_a_foreign_loop(world_size: int, tmp_path: Path) -> None:
    import dataclasses

    cases = [dataclasses.replace(case, objective=name) for name in OBJECTIVES for case in LAYOUTS[world_size]]
    pairs = make_pairs()
    folder = tmp_path / "llama"
    problem = DenseProblem(make_hf_model(folder / "model"), make_hf_model(folder / "reference", seed=1), pairs)
    answers = {name: problem.answer(build_objective(name, {})) for name in OBJECTIVES}
    for before_step in (False, True):
        asked = [case for case in cases if before_step or case.pp == 1 or case.objective != "kto"]
        results = run_distributed(run_foreign, world_size, asked, str(tmp_path), collection(pairs), 5, before_step)[0]
        for case, result in zip(asked, results, strict=True):
            check(case, result, answers[case.objective])
