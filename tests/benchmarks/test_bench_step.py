"""The benchmark runs, says what it measured, and measures nothing where the two sides do not agree."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--num-pairs 5 --shrink 8 --hidden-size 32 --ffn-hidden-size 48 --num-layers 2 --num-attention-heads 4 --num-query-groups 2 "
    "--vocab-size 200 --tokens-per-microbatch 256 --baseline-pairs-per-microbatch 2 --repeats 1"
)


def bench(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        f"import sys\nfrom benchmarks import bench_step\n{code}\nsys.exit(bench_step.main(sys.argv[1:]))",
    ]
    return subprocess.run([*command, *SMALL, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_both_sides_agree_and_a_line_is_appended_each_time(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    for count in (1, 2):
        run = bench("", "--csv", str(results))
        assert run.returncode == 0, run.stderr
        assert "results agree to" in run.stdout
        with results.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
    row = rows[-1]
    assert float(row["agreement"]) < 1e-4
    assert row["pairs"] == "5"
    # Fixed by the lengths alone, so equal in both runs; less work than padding does.
    assert rows[0]["ours_flops"] == row["ours_flops"]
    assert float(row["ours_flops"]) < float(row["baseline_flops"])
    assert all(
        float(row[f"{side}_{name}"]) > 0 for side in ("ours", "baseline") for name in ("seconds", "cpu_seconds", "peak_bytes")
    )


@pytest.mark.slow
def test_sides_that_disagree_are_not_measured(tmp_path: Path) -> None:
    run = bench("bench_step.PaddedBaseline.gamma_max = 1.5", "--csv", str(tmp_path / "results.csv"))
    assert run.returncode == 1
    assert "do not agree" in run.stderr
    assert not (tmp_path / "results.csv").exists()
