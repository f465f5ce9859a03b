"""The pipeline benchmark against shares worked by hand, and its goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_pipeline


def run(tmp_path: Path, *arguments: str) -> int:
    models = ["--models", "Llama-3-8B", "--num-batches", "1"]
    return bench_pipeline.main(["--csv", str(tmp_path / "a.csv"), *models, "--json", *arguments])


def test_equal_pairs_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.jsonl"
    rows = [{"prompt_len": 90, "chosen_len": 50, "rejected_len": 50}] * 16
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--lengths", str(path), "--stages", "1", "4", "--ranks", "2", "32", "--batch-sizes", "16", "--least", "2"]
    assert run(tmp_path, *arguments) == 0
    # Fewer pairs than ranks are no case.
    one, four = json.loads(capsys.readouterr().out)["rows"]
    assert [one[f"{name}_{when}"] for name in ("step", "gradient", "cost") for when in ("before", "after")] == pytest.approx(
        [0, 0, 0, 0, one["cost_before"], one["cost_before"]], abs=1e-9
    )
    packs = {name: (four[f"{name}_packs_before"], four[f"{name}_packs_after"]) for name in ("gradient", "unconditional")}
    assert packs == {"gradient": (1, 8), "unconditional": (1, 8)}
    for name in ("gradient", "unconditional", "step"):
        assert four[f"{name}_even_before"] == pytest.approx(3 / 4)
        assert four[f"{name}_even_after"] == pytest.approx(3 / 11)
        # Of one pack three stages wait; of several, for the output layer that the last stage has besides, too.
        assert four[f"{name}_after"] > 3 / 11
        if name != "step":
            assert four[f"{name}_before"] == pytest.approx(3 / 4)
    # One pass begins while the other drains.
    assert four["step_before"] < 0.74
    assert four["step_after"] < min(four["gradient_after"], four["unconditional_after"])
    assert four["imbalance_after"] == pytest.approx(1.0)
    # What packs cost beside their tokens is counted, too.
    assert four["cost_after"] > 1 / (1 - four["step_after"])


def test_goals_are_held_with_the_trainers_defaults_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = ["--lengths", "hh", "--stages", "4", "--ranks", "8", "--batch-sizes", "128"]
    assert run(tmp_path, *case, "--check") in (0, 1)
    goals = json.loads(capsys.readouterr().out)["goals"]
    assert [(goal["limit"], goal["name"].split(", ")[-1]) for goal in goals] == [
        (0.25, "128 pairs: idle share of a step"),
        (0.5, "after over before"),
        (1.0, "worst case"),
    ]
    for other in (["--least", "4"], ["--seq-length", "1024"], ["--tokens-per-microbatch", "16384"]):
        assert run(tmp_path, *case, *other) == 0
        assert json.loads(capsys.readouterr().out)["goals"] == []
