"""The benchmark of the order and of what stands around it: its data are data, its figures those of a run, its goals heeded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_order
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore


def test_the_data_is_a_data_set_of_repeated_lengths(tmp_path: Path) -> None:
    lengths = np.array([[5, 3, 2], [7, 1, 1], [4, 9, 6]])
    bench_order.write_data(tmp_path / "pairs", 8, lengths)
    store = PairStore(tmp_path / "pairs")
    assert store.lengths.tolist() == np.resize(lengths, (8, 3)).tolist()
    assert (store[7].rejected.tolist(), store.longest) == ([0], 13)
    assert PairCollection([store])[4].prompt.size == 7


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
