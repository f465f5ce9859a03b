"""The benchmark of output layer and log-prob: every method against float64, none timed that is wrong, one rank and two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bench_logprobs, head_methods
from benchmarks.head_methods import Problem
from benchmarks.measure import Cost, Spread
from benchmarks.report import read_rows
from tests.harness import run_distributed

SMALL = [
    "--tokens",
    "37",
    "--vocab-size",
    "58",
    "--hidden-size",
    "11",
    "--logprob-chunk-size",
    "5",
    "--repeats",
    "1",
    "--check",
]


def bench(path: str) -> int | str:
    try:
        return bench_logprobs.main([*SMALL, "--csv", path])
    except SystemExit as end:
        return str(end)


@pytest.mark.dist
def test_every_method_is_compared_with_float64(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert run_distributed(bench, 1, str(path)) == [0]
    rows = read_rows(path)
    assert [row["method"] for row in rows[:4]] == ["fused", "dense, all tokens", "dense, scored", "megatron, scored"]
    assert all(0 < float(row["logprob_error"]) < 1e-5 and 0 < float(row["gradient_error"]) < 2e-6 for row in rows)
    flops = [float(row["flops"]) for row in rows[:3]]
    # 37 tokens, 22 of them scored; three products of the logits' size, and one more to make them again.
    assert flops == [4 * 2 * 22 * 11 * 58, 3 * 2 * 37 * 11 * 58, 3 * 2 * 22 * 11 * 58]
    fused, dense, scored = (int(row["peak_bytes"]) for row in rows[:3])
    assert fused < scored < dense


@pytest.mark.dist
def test_two_ranks_share_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert run_distributed(bench, 2, str(path)) == [0, 0]
    rows = read_rows(path)
    assert [row["method"] for row in rows] == ["fused", "megatron, scored"]
    assert float(rows[0]["flops"]) == 4 * 2 * 22 * 11 * 29


def wrong(problem: Problem) -> Tensor:
    return 1.01 * head_methods.dense_all_tokens(problem)


def bench_with_a_wrong_method(path: str, name: str) -> int | str:
    bench_logprobs.methods = lambda size: {"fused": head_methods.fused, name: wrong}
    return bench(path)


@pytest.mark.dist
def test_a_method_that_computes_something_else_is_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert run_distributed(bench_with_a_wrong_method, 1, str(path), "dense, all tokens") == [0]
    assert [row["method"] for row in read_rows(path)] == ["fused"]
    path.unlink()
    assert run_distributed(bench_with_a_wrong_method, 1, str(path), "fused") == ["ours is far from float64: nothing measured"]
    assert not path.exists()


def test_goals_of_cost_are_those_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = Cost(Spread(1, 1, 1), Spread(1, 1, 1), flops=1.0, peak_bytes=10)
    results = {name: (bench_logprobs.Errors(1e-6, 3e-6), cost) for name in ("fused", "dense, all tokens")}
    settings = {"tokens": 2048, "vocab_size": 128256, "hidden_size": 64, "scored_share": 0.6, "chunk_size": 4096}
    settings |= {"tensor_model_parallel_size": 1}
    goals = bench_logprobs.goals(settings, results)
    assert [(goal.limit, goal.measured, goal.reached) for goal in goals] == [
        (1e-5, 1e-6, True),
        (2e-6, 3e-6, False),
        (7.0, 1.0, False),
        (0.55, 1.0, False),
    ]
    for name, value in (("tokens", 2047), ("scored_share", 0.5), ("chunk_size", 8192)):
        assert len(bench_logprobs.goals(settings | {name: value}, results)) == 2
    for name in ("scored_share", "chunk_size", "tensor_model_parallel_size"):
        assert bench_logprobs.goals(settings | {name: 2}, results)[0].name != goals[0].name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [goal.limit for goal in bench_logprobs.goals(settings, results)] == [1e-5, 2e-6, 7.0]


def test_with_cuda_wall_clock_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = bench_logprobs.Errors(1e-6, 1e-6)
    ours = Cost(Spread(1, 2, 3), Spread(4, 5, 6), flops=1.0, peak_bytes=1)
    theirs = Cost(Spread(1, 6, 7), Spread(4, 20, 30), flops=1.0, peak_bytes=1)

    def shown() -> list[str]:
        lines = bench_logprobs.table("", {"fused": (errors, ours), "theirs": (errors, theirs)}).splitlines()
        return [*lines[1].split()[:-10], *lines[3].split()[1:3]]

    assert shown() == ["CPU", "s", "20.00", "4.00x"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert shown() == ["s", "6.00", "3.00x"]


def test_a_share_of_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_logprobs.parse_options(["--scored-share", "0"])
    assert "--scored-share 0.0: must lie above 0" in capsys.readouterr().err
