"""The benchmark of checkpoints: what each rank counts, and what the worst one makes of its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_checkpoint
from tests.harness import run_distributed

FOUND: dict[str, Any] = {
    **{"memory_save": 60, "memory_background": 70, "memory_load": 1, "written": 50, "read": 55, "total": 100, "parameters": 9},
    **{"stall_sync": [3.0, 1.0], "stall_background": [0.5, 0.5]},
}


def test_the_worst_rank_counts() -> None:
    row = bench_checkpoint.make_row([FOUND, FOUND | {"read": 65, "stall_sync": [2.0, 5.0]}])
    assert (row["dp"], row["written_over_share"], row["memory_save_over_share"]) == (2, 1.0, 1.2)
    assert row["read_over_share"] == 1.3
    assert row["stall_sync_p50"] == 4.0
    reached = {goal.name: goal.reached for goal in bench_checkpoint.goals([row, bench_checkpoint.make_row([FOUND])])}
    assert len(reached) == 4
    assert [name for name, is_reached in reached.items() if not is_reached] == [
        "checkpoint, DP 2: read, worst rank over its share"
    ]


@pytest.mark.dist
def test_what_ranks_write_is_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"num-layers": 2, "hidden-size": 64, "ffn-hidden-size": 88, "vocab-size": 1000, "repeats": 1}
    options = bench_checkpoint.parse_options([word for name, size in sizes.items() for word in (f"--{name}", str(size))])
    found = run_distributed(bench_checkpoint.measure_rank, 2, options, tmp_path)
    assert sum(one["written"] for one in found) == found[0]["total"] == found[1]["total"]
    # Fp32: weights, the optimizer's own, two moments; names and places come on top.
    assert found[0]["total"] == pytest.approx(16 * found[0]["parameters"], rel=0.1)
    assert all(one["read"] > found[0]["total"] / 2 for one in found)
    assert [len(one[f"stall_{way}"]) for one in found for way in ("sync", "background")] == [1] * 4
