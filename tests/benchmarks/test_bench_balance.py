"""The balance benchmark against shares worked by hand, and its goals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_balance
from benchmarks.inputs import step_costs
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.sizes import CostModel


def run(tmp_path: Path, *arguments: str) -> int:
    return bench_balance.main(["--csv", str(tmp_path / "a.csv"), "--num-batches", "3", "--json", *arguments])


def test_costs_are_a_gradient_pass_and_an_unconditional_pass() -> None:
    layout = BatchLayout(0, 2, 100, CostModel(1.0, 0.0, 10.0), unconditional="bos", bos_token_id=1)
    # Tokens in the row: the prompt once, each response without its last token; alone, a BOS token stands for the last one.
    gradient = (5 + 3 - 1 + 4 - 1) + 10 * (3 + 4)
    assert step_costs(np.array([[5, 3, 4]]), layout).tolist() == [3 * gradient + (3 + 4) + 10 * (3 + 4)]
    once_more = dataclasses.replace(layout, unconditional=None, forward_passes=1)
    assert step_costs(np.array([[5, 3, 4]]), once_more).tolist() == [4 * gradient]


def test_imbalance_and_the_bound_of_a_pair_that_is_never_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.jsonl"
    rows = [{"prompt_len": 9, "chosen_len": 5, "rejected_len": 5}] * 4
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(tmp_path, "--lengths", str(path), "--ranks", "2", "3", "8", "--batch-size", "4") == 0
    two, three, eight = json.loads(capsys.readouterr().out)["rows"]
    assert (two["worst"], two["worst_bound"]) == (1.0, 1.0)
    # Four equal pairs: one of three ranks gets two of them; of eight ranks, half do nothing.
    assert (three["imbalance_p50"], three["worst"], three["bound"]) == pytest.approx((1.5, 1.5, 1.0))
    assert (eight["worst"], eight["worst_bound"]) == pytest.approx((2.0, 2.0))
    assert two["peak_bytes"] > 0


def test_goals_of_recorded_lengths_are_held(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_balance, "MOST_MILLISECONDS", 1e6)  # how fast, a test does not ask
    assert run(tmp_path, "--lengths", "ultrafeedback", "--check") == 0
    goals = json.loads(capsys.readouterr().out)["goals"]
    assert [goal["limit"] for goal in goals] == [1.005, 1e6, 1.01, 1e6, 1.03, 1e6]
    monkeypatch.setattr(bench_balance, "MOST_IMBALANCE", {16: 1.0})
    assert run(tmp_path, "--lengths", "ultrafeedback", "--check") == 1
    assert "ultrafeedback, 16 ranks: max / mean, worst batch" in capsys.readouterr().err


@pytest.mark.parametrize("other", [("--batch-size", "64"), ("--seq-length", "1024"), ("--lengths", "hh"), ("--ranks", "4")])
def test_goals_are_not_held_under_other_settings(
    other: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--lengths", "ultrafeedback", "--ranks", "8", *other) == 0
    assert json.loads(capsys.readouterr().out)["goals"] == []
