"""The benchmark of starts: what ranks read, summed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_start
from benchmarks.checkpoint_files import plan_weights, write_config, write_random_weights
from tests.harness import run_distributed

EACH = {"read": 100, "cpu_seconds": [1.0, 3.0], "seconds": [2.0, 2.0]}
FOUND = {"each": EACH, "broadcast": EACH | {"read": 51}}


def test_bytes_and_cpu_are_summed_and_the_last_rank_ends_the_time() -> None:
    rows = bench_start.make_rows([FOUND, {"each": EACH | {"seconds": [5.0, 5.0]}, "broadcast": EACH | {"read": 50}}], 100)
    each, shared = [row | {"tensor_model_parallel_size": 1} for row in rows]
    assert (each["read_over_model"], each["cpu_seconds_p50"], each["seconds_p50"]) == (2.0, 4.0, 5.0)
    (goal,) = bench_start.goals([each, shared])
    assert goal.measured == 1.01
    assert goal.reached


@pytest.mark.dist
def test_two_replicas_read_a_model_once_or_twice(tmp_path: Path) -> None:
    sizes = {"num-layers": 2, "hidden-size": 64, "ffn-hidden-size": 88, "num-attention-heads": 4, "vocab-size": 1000}
    words = [word for name, size in (sizes | {"repeats": 1}).items() for word in (f"--{name}", str(size))]
    options = bench_start.parse_options(words)
    options.tensor_model_parallel_size = 1
    write_config(tmp_path / bench_start.MODEL, vars(options))
    plan = plan_weights(tmp_path / bench_start.MODEL)
    write_random_weights(tmp_path / bench_start.MODEL, plan, 1e9, seed=1)
    found = run_distributed(bench_start.measure_rank, 2, options, tmp_path)
    num_bytes = sum(tensor.num_bytes for tensor in plan)
    assert [one["each"]["read"] for one in found] == [num_bytes] * 2
    assert sum(one["broadcast"]["read"] for one in found) == num_bytes
