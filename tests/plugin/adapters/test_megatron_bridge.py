"""Megatron-Bridge's ``finetune`` on preference pairs: the package itself where it is there, a stand-in of its loop everywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.harness import run_distributed
from tests.integration.test_invariance import check
from tests.integration.worlds import Case
from tests.plugin.adapters import bridge_runs, stand_in_runs
from tests.plugin.adapters.bridge_on_cpu import bridge_is_installed
from tests.plugin.adapters.first_step import OBJECTIVES, write_problem

LAYOUTS = {
    1: [Case("TP 1")],
    2: [Case("TP 2, sequence parallel", tp=2, sequence_parallel=True), Case("PP 2", pp=2), Case("DP 2")],
}
with_the_package = pytest.mark.skipif(
    not bridge_is_installed(), reason="needs Megatron-Bridge itself (0.6.2, Python 3.12), which is not installed"
)


@with_the_package
@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_the_package_gives_the_dense_loss_and_gradients(world_size: int, tmp_path: Path) -> None:
    answers = write_problem(tmp_path)
    cases = [dataclasses.replace(case, objective=name) for case in LAYOUTS[world_size] for name in OBJECTIVES]
    results = run_distributed(bridge_runs.first_steps, world_size, cases, str(tmp_path))[0]
    for case, result in zip(cases, results, strict=True):
        check(case, result, answers[case.objective])


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_the_loop_gives_the_dense_loss_and_gradients(world_size: int, tmp_path: Path) -> None:
    answers = write_problem(tmp_path)
    cases = [dataclasses.replace(case, objective=name) for case in LAYOUTS[world_size] for name in OBJECTIVES]
    results = run_distributed(stand_in_runs.first_steps, world_size, cases, str(tmp_path))[0]
    for case, result in zip(cases, results, strict=True):
        check(case, result, answers[case.objective])
