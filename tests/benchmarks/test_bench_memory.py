"""The benchmark of the memory estimate: which rank of a stage counts, and what is missed."""

from __future__ import annotations

import pytest

from benchmarks import bench_memory
from benchmarks.memory_layouts import LAYOUTS, Counted, estimated
from megatron_rmipo.memory.pack import PackSize

LAYOUT = next(layout for layout in LAYOUTS if layout.name == "PP 2")
(PACK,) = {(sum(lengths), sum(lengths[1:])) for lengths in LAYOUT.lengths}


def counted(stage: int, standing: float, peak: float) -> Counted:
    """A rank that the estimate is so far from."""
    size = PackSize(*PACK)
    estimate = estimated(LAYOUT, Counted(stage, 0, 0, size, 12))
    return Counted(stage, round(estimate.standing.total / standing), round(estimate.pack.peak / peak), size, 12)


def test_of_each_stage_the_rank_that_the_estimate_is_farthest_from() -> None:
    ranks = [counted(0, 1.0, 0.9), counted(0, 1.05, 1.0), counted(1, 1.2, 1.0)]
    rows = bench_memory.rows_of(LAYOUT, ranks)
    assert [row["stage"] for row in rows] == [0, 1]
    assert [row["error"] for row in rows] == pytest.approx([0.1, 0.2], abs=1e-4)
    assert rows[0]["peak_ratio"] == pytest.approx(0.9, abs=1e-4)
    (goal,) = bench_memory.goals(rows)
    assert not goal.reached
    assert len(bench_memory.table(rows).splitlines()) == 3


def test_layouts_are_told_apart() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 10
