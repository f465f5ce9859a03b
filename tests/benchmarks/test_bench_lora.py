"""The benchmark of adapters: what its rows and goals are made of, and that sides which disagree are not measured."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import bench_lora
from benchmarks.lora_sides import SIDES, SideCost
from benchmarks.padded_baseline import StepResult
from benchmarks.report import read_rows

STEPS = (StepResult(torch.tensor([1.0, 2.0]), 3.0), StepResult(torch.tensor([0.9, 1.9]), 2.0))
FULL = SideCost(STEPS, [4.0, 6.0], 100, 1000, 1000, 4000, 12000, 8000, 50.0, 10)
LORA = SideCost(STEPS, [2.0, 3.0], 60, 1100, 100, 4400, 1200, 6000, 40.0, 10)
COSTS = {side.name: [LORA if side.has_adapter else FULL] * 3 for side in SIDES}


def options_of(*arguments: str) -> argparse.Namespace:
    return bench_lora.parse_options(arguments)


def test_rows_are_medians_over_the_rounds_and_ratios_to_the_whole_model() -> None:
    rounds = [
        dataclasses.replace(LORA, resident_bytes=size, cpu_seconds=[cpu]) for size, cpu in ((60, 2.0), (90, 9.0), (70, 2.5))
    ]
    full, lora, recomputed = bench_lora.rows_of(options_of(), COSTS | {"lora": rounds}, 1e-6)
    assert (full["side"], full["trained_share"], full["cpu_over_full"], full["standing_bytes"]) == ("full", 1.0, 1.0, 16000)
    assert (lora["trained_share"], lora["standing_over_full"]) == (pytest.approx(1 / 11), 0.35)
    assert lora["peak_over_full"] == pytest.approx((5600 + 6000) / (16000 + 8000))
    assert (lora["resident_bytes"], lora["cpu_seconds_p50"], lora["cpu_over_full"]) == (70, 2.5, 0.5)
    assert recomputed["resident_over_full"] == 0.6
    assert len(bench_lora.table([full, lora, recomputed]).splitlines()) == 4


def test_goals_are_those_of_one_model() -> None:
    rows = bench_lora.rows_of(options_of(), COSTS, 1e-6)
    assert [(goal.measured, goal.reached) for goal in bench_lora.goals(options_of(), rows)] == [(0.35, True), (0.5, True)]
    for other in ("--bf16", "--rank 8", "--num-pairs 8", "--lengths ultrafeedback", "--shrink 2", "--hidden-size 256"):
        assert bench_lora.goals(options_of(*other.split()), rows) == [], other


def test_sides_that_train_the_adapter_otherwise_are_not_measured() -> None:
    assert bench_lora.check_agreement(COSTS, 1e-4) == 0.0
    # The whole model's second step is another.
    other = dataclasses.replace(FULL, first_steps=(STEPS[0], StepResult(torch.tensor([0.5, 1.0]), 1.0)))
    assert bench_lora.check_agreement(COSTS | {"full": [other]}, 1e-4) == 0.0
    late = dataclasses.replace(LORA, first_steps=(STEPS[0], StepResult(torch.tensor([0.9, 1.9]), 2.1)))
    with pytest.raises(SystemExit, match=r"step 2: lora and peft \+ TRL do not agree"):
        bench_lora.check_agreement(COSTS | {"peft + TRL": [late]}, 1e-4)


@pytest.mark.slow
@pytest.mark.dist
def test_every_side_in_a_process_of_its_own(tmp_path: Path) -> None:
    small = shlex.split(
        "--num-pairs 2 --shrink 8 --hidden-size 32 --ffn-hidden-size 48 --num-layers 2 --num-attention-heads 4 "
        "--num-query-groups 2 --vocab-size 256 --tokens-per-microbatch 256 --repeats 1 --rank 2"
    )
    has_trl = importlib.util.find_spec("trl") is not None
    results = tmp_path / "results.csv"
    assert bench_lora.main([*small, *(["--trl"] if has_trl else []), "--csv", str(results)]) == 0
    rows = {row["side"]: row for row in read_rows(results)}
    assert list(rows) == [side.name for side in SIDES if side.is_ours or has_trl]
    full, lora, recomputed = (rows[name] for name in ("full", "lora", "lora, recomputed"))
    # fp32: weights, gradients, the optimizer's two moments; it keeps a number or two beside them.
    assert float(full["standing_bytes"]) == pytest.approx(4 * float(full["parameter_bytes"]), rel=0.05)
    trained = float(lora["trained_share"]) * float(lora["parameter_bytes"])
    # Gradients and the optimizer of what is trained, and of nothing else but what a tensor of a few numbers takes beside them.
    assert 3 * trained <= float(lora["other_bytes"]) < 0.2 * float(full["other_bytes"])
    assert float(recomputed["pass_bytes"]) < float(lora["pass_bytes"]) < float(full["pass_bytes"])
    # No products for gradients of frozen weights.
    assert float(lora["flops"]) < 0.9 * float(full["flops"])
    assert all(0 <= float(row["agreement"]) < 1e-4 for row in rows.values())
    if has_trl:
        assert rows["peft + TRL"]["trained_share"] == lora["trained_share"]
