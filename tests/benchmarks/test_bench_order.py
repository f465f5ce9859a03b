"""The benchmark of the order and of what stands around it: its data are data, its figures those of a run, its goals heeded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_order


@pytest.mark.slow
def test_figures_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_order, "GOAL_PAIRS", 3000)
    monkeypatch.setattr(bench_order, "MOST_CPU_SECONDS", -1.0)
    arguments = ["--num-pairs", "3000", "--num-batches", "3", "--csv", str(tmp_path / "a.csv"), "--json", "--check"]
    assert bench_order.main(arguments) == 1
    shown = json.loads(capsys.readouterr().out)
    (row,) = shown["rows"]
    assert row["num_pairs"] == 3000
    assert min(value for name, value in row.items() if name.endswith(("seconds", "_ms"))) > 0
    assert [goal["name"].split(": ")[1] for goal in shown["goals"] if not goal["reached"]] == ["CPU s of a rank's start"]
