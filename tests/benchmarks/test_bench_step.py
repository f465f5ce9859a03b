"""The benchmark runs, says what it measured, and measures nothing where the sides do not agree."""

from __future__ import annotations

import importlib.util
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_step
from benchmarks.measure import Cost, Spread
from benchmarks.padded_baseline import StepResult
from benchmarks.report import read_rows
from benchmarks.sides import Step, check_agreement, compare
from tests.harness import free_port

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--num-pairs 6 --shrink 8 --hidden-size 32 --ffn-hidden-size 48 --num-layers 2 --num-attention-heads 4 --num-query-groups 2 "
    "--vocab-size 200 --tokens-per-microbatch 256 --baseline-pairs-per-microbatch 2 --repeats 1"
)


def bench(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        f"import sys\nfrom benchmarks import bench_step, sides\n{code}\nsys.exit(bench_step.main(sys.argv[1:]))",
    ]
    return subprocess.run([*command, *SMALL, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_all_sides_agree_and_a_line_is_appended_each_time(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    trl = ["--trl"] if importlib.util.find_spec("trl") else []
    for arguments in ([], ["--objective", "simpo", *trl]):
        run = bench("", "--csv", str(results), *arguments)
        assert run.returncode == 0, run.stderr
        assert "results agree to" in run.stdout
    rmipo, simpo = read_rows(results)
    assert all(0 < float(row["agreement"]) < 1e-4 for row in (rmipo, simpo))
    assert (rmipo["objective"], simpo["objective"], rmipo["pairs"]) == ("rmipo", "simpo", "6")
    # Fixed by the lengths alone: SimPO beside RMiPO is SimPO.
    assert rmipo["simpo_flops"] == simpo["ours_flops"]
    assert rmipo["simpo_minimum_flops"] == simpo["minimum_flops"]
    for row in (rmipo, simpo):
        assert float(row["ours_flops"]) < float(row["baseline_flops"])
        # Attention counts as full squares and the head makes its logits twice.
        assert 0.5 * float(row["ours_flops"]) < float(row["minimum_flops"]) < float(row["ours_flops"])
    assert float(simpo["ours_flops"]) < float(rmipo["ours_flops"])
    names = ("seconds_p20", "seconds_p50", "cpu_seconds_p50", "cpu_seconds_p80", "peak_bytes")
    measured = [(rmipo, ("ours", "baseline", "simpo")), (simpo, ("ours", "baseline", *(["trl"] if trl else [])))]
    assert all(float(row[f"{side}_{name}"]) > 0 for row, sides in measured for side in sides for name in names)
    assert simpo["simpo_seconds_p50"] == ""
    if trl:
        # Padded like the other one, so as much work: what differs is what is counted beside products.
        assert simpo["trl_flops"] == simpo["baseline_flops"]
        assert simpo["trl"]


@pytest.mark.slow
@pytest.mark.dist
def test_under_torchrun_ours_is_sharded_and_the_first_rank_reports(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [*launcher, "-m", "benchmarks.bench_step", *SMALL, "--csv", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "ours at TP 2" in run.stdout
    (row,) = read_rows(results)
    assert (row["tensor_model_parallel_size"], float(row["agreement"]) < 1e-4) == ("2", True)
    # Half of the products; attention's heads and the vocabulary are halved like everything else.
    assert 1 < float(row["ours_flops"]) / float(row["minimum_flops"]) < 2


def costs_of(ours: float, baseline: float, simpo: float, simpo_peak: int) -> dict[str, Cost]:
    def cost(cpu: float, peak: int) -> Cost:
        return Cost(Spread(0, 0, 0), Spread(0, cpu, 0), flops=104.0, peak_bytes=peak)

    return {"ours": cost(ours, 1000), "baseline": cost(baseline, 1), "simpo": cost(simpo, simpo_peak)}


def test_goals_are_those_of_one_model_and_recorded_lengths_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(*arguments: str) -> list[tuple[float, float, bool]]:
        # The arithmetic allows 1.25 of SimPO; 2.0 / 1.6 is 1.25, and 1000 / 980 above 1.01.
        costs = costs_of(2.0, 5.2, simpo=1.6, simpo_peak=980)
        meant = shlex.split("--hidden-size 512 --ffn-hidden-size 1408 --num-layers 8 --vocab-size 32000")
        options = bench_step.parse_options([*meant, *arguments])
        if "--num-pairs" not in arguments:
            options.num_pairs = {"ultrafeedback": 8}.get(options.lengths, 16)
        goals = bench_step.goals(options, costs, {"rmipo": 100.0, "simpo": 80.0}, 0.02)
        return [(round(goal.limit, 9), round(goal.measured, 4), goal.reached) for goal in goals]

    simpo = [(1.28, 1.25, True), (0.01, 0.02, False), (1.01, 1.0204, False)]
    assert verdicts("--lengths", "ultrafeedback") == [(3.0, 2.6, False), *simpo]
    assert verdicts("--lengths", "hh") == [(2.8, 2.6, False), *simpo]
    for other in shlex.split(
        "'--objective simpo' '--shrink 4' --no-baseline-recompute '--recompute-granularity full' '--num-layers 7' "
        "'--num-pairs 8' '--seq-length 1024' --bf16 '--num-attention-heads 4' '--num-query-groups 8' "
        "'--tokens-per-microbatch 8192' '--baseline-pairs-per-microbatch 1'"
    ):
        assert verdicts("--lengths", "hh", *other.split()) == [], other
    assert verdicts("--lengths", "a/hh.jsonl") == verdicts() == []
    # With CUDA the CPU only waits.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert verdicts("--lengths", "hh") == simpo[2:]


def step_result(loss: float, grad_norm: float) -> StepResult:
    return StepResult(torch.tensor([1.0, loss]), grad_norm)


def test_sides_agree_where_losses_and_gradient_norms_do() -> None:
    assert compare(step_result(2.002, 3.0), step_result(2.0, 3.0), "a", 1e-2) == pytest.approx(1e-3, rel=1e-3)
    assert compare(step_result(2.0, 3.006), step_result(2.0, 3.0), "a", 1e-2) == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize(("loss", "grad_norm"), [(2.1, 3.0), (2.0, 3.1), (math.nan, 3.0), (2.0, math.nan)])
def test_sides_that_differ_or_are_not_numbers_do_not_agree(loss: float, grad_norm: float) -> None:
    with pytest.raises(SystemExit, match=r"a do not agree .* nothing measured"):
        compare(step_result(loss, grad_norm), step_result(2.0, 3.0), "a", 1e-2)


def test_every_other_side_is_compared_in_two_steps() -> None:
    taken: list[str] = []

    def side(name: str, *losses: float) -> Step:
        numbers = iter(losses)

        def step() -> StepResult:
            taken.append(name)
            return step_result(next(numbers), 1.0)

        return step

    worst = check_agreement(side("ours", 2.0, 4.0), {"b": side("b", 2.0, 4.0), "c": side("c", 2.0, 4.004)}, 1e-2)
    assert worst == pytest.approx(1e-3, rel=1e-2)
    assert taken == ["ours", "b", "c"] * 2
    with pytest.raises(SystemExit, match="step 2: ours and c do not agree"):
        check_agreement(side("ours", 2.0, 4.0), {"b": side("b", 2.0, 4.0), "c": side("c", 2.0, 4.4)}, 1e-2)


@pytest.mark.slow
def test_sides_that_disagree_are_not_measured(tmp_path: Path) -> None:
    run = bench("sides.PaddedBaseline.gamma_max = 1.5", "--csv", str(tmp_path / "results.csv"))
    assert run.returncode == 1
    assert "ours and padded (transformers) do not agree" in run.stderr
    assert not (tmp_path / "results.csv").exists()
