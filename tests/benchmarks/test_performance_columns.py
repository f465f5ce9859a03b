"""Every column that docs/performance.md shows is one that the benchmarks write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_alone,
    bench_balance,
    bench_checkpoint,
    bench_convert,
    bench_data,
    bench_flops,
    bench_gpu,
    bench_logprobs,
    bench_lora,
    bench_memory,
    bench_order,
    bench_pipeline,
    bench_scale,
    bench_start,
    bench_step,
    gpu_results,
)
from benchmarks.bench_convert import Conversion
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_results import PHASES, Results
from benchmarks.gpu_steps import VARIANTS, Timing
from benchmarks.inputs import random_pairs
from benchmarks.loading import Loading
from benchmarks.measure import Cost, Spread
from benchmarks.performance_tables import TABLES
from benchmarks.preparing import Preparing
from benchmarks.report import read_rows, report
from benchmarks.scale_world import Measured
from tests.benchmarks import test_bench_start
from tests.benchmarks.test_bench_checkpoint import FOUND
from tests.benchmarks.test_bench_lora import COSTS
from tests.benchmarks.test_bench_memory import LAYOUT, counted

SPREAD = Spread(1.0, 2.0, 3.0)
COST = Cost(SPREAD, SPREAD, flops=4.0, peak_bytes=5)


def write_step(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_step, "version", lambda _name: "0.1")
    options = bench_step.parse_options(["--lengths", "hh", "--objective", "simpo", "--trl"])
    pairs = random_pairs(np.array([[3, 4, 2]]), 50, np.random.default_rng(5))
    costs = dict.fromkeys(("ours", "baseline", "trl", "simpo"), COST)
    row = bench_step.record(options, pairs, costs, {"rmipo": 1.0, "simpo": 1.0}, 0.1, 0.01)
    write(path, [row])


def write_flops(path: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("initialize_runtime", "shutdown_runtime"):
        patch.setattr(bench_flops, name, lambda *_, **__: None)
    patch.setattr(bench_flops, "step_flops", lambda *_: 1.0)
    assert bench_flops.main(["--lengths", "hh", "--batch-size", "2", "--csv", str(path)]) == 0


def write_logprobs(path: Path, patch: pytest.MonkeyPatch) -> None:
    settings = {"tokens": 2, "vocab_size": 3, "hidden_size": 4, "scored_share": 0.5, "chunk_size": 1}
    settings |= {"tensor_model_parallel_size": 1, "repeats": 1}
    write(path, bench_logprobs.make_rows(settings, {"fused": (bench_logprobs.Errors(0.1, 0.1), COST)}))


def write_balance(path: Path, patch: pytest.MonkeyPatch) -> None:
    arguments = ["--lengths", "hh", "--ranks", "2", "--num-batches", "1", "--batch-size", "4", "--csv", str(path)]
    assert bench_balance.main(arguments) == 0


def write_pipeline(path: Path, patch: pytest.MonkeyPatch) -> None:
    arguments = ["--lengths", "ultrafeedback", "--models", "Llama-3-8B", "--stages", "2", "--ranks", "2", "--batch-sizes", "128"]
    assert bench_pipeline.main([*arguments, "--num-batches", "1", "--csv", str(path)]) == 0


def write_data(path: Path, patch: pytest.MonkeyPatch) -> None:
    preparing = Preparing("hh", 1, 2, 3, SPREAD, SPREAD, SPREAD, SPREAD, SPREAD, SPREAD)
    loading = Loading("hh", 8, 1, SPREAD, SPREAD, SPREAD, 1.0, SPREAD, 0.1)
    patch.setattr(bench_data, "prepare_all", lambda *_: [preparing])
    patch.setattr(bench_data, "load_all", lambda *_: [loading])
    assert bench_data.main(["--csv", str(path)]) == 0


def write_convert(path: Path, patch: pytest.MonkeyPatch) -> None:
    one = Conversion.of(bench_convert.DIRECTIONS[0], 10, [(1.0, 2.0)], [(1.0, 2.0)], 3)
    patch.setattr(bench_convert, "make_models", lambda *_: (None, None, 10))
    patch.setattr(bench_convert, "measure_conversions", lambda *_: [one])
    patch.setattr(bench_convert, "startup_cost", lambda: (1.0, 1.0))
    assert bench_convert.main(["--csv", str(path)]) == 0


def write_scale(path: Path, patch: pytest.MonkeyPatch) -> None:
    one = Measured(1.0, 2, 3.0, 4.0, 5)
    patch.setattr(bench_scale, "measure_ranks", lambda *_: {"order of a batch": one})
    patch.setattr(bench_scale, "measure_pairs", lambda *_: {"order of a batch": one})
    assert bench_scale.main(["--pairs", "3", "10", "--batch-size", "2", "--csv", str(path)]) == 0


def write_checkpoint(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_checkpoint, "measure_world", lambda *_: bench_checkpoint.make_row([FOUND]))
    assert bench_checkpoint.main(["--dp", "1", "--csv", str(path)]) == 0


def write_start(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_start, "measure_world", lambda *_: bench_start.make_rows([test_bench_start.FOUND], 100))
    assert bench_start.main(["--ranks", "1", "--csv", str(path)]) == 0


def write_memory(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_memory, "measure", lambda _layouts: bench_memory.rows_of(LAYOUT, [counted(0, 1.0, 1.0)]))
    assert bench_memory.main(["--csv", str(path)]) == 0


def write_lora(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_lora, "measure", lambda *_: COSTS)
    assert bench_lora.main(["--csv", str(path)]) == 0


def write_order(path: Path, patch: pytest.MonkeyPatch) -> None:
    parts = {
        "start_": ("cpu_seconds", "peak_megabytes"),
        "": ("order_cpu_ms", "build_cpu_ms", "batches_peak_megabytes", "worker_megabytes"),
        "mismatched_": ("cpu_seconds", "peak_megabytes"),
    }
    figures = {f"{part}{name}": 1.0 for part, names in parts.items() for name in names}
    patch.setattr(bench_order, "measure", lambda num_pairs, *_: {"num_pairs": num_pairs, **figures})
    assert bench_order.main(["--num-pairs", "3", "--csv", str(path)]) == 0


def write_gpu(path: Path, patch: pytest.MonkeyPatch) -> None:
    timings = {name: Timing([1.0], dict.fromkeys(PHASES, 1.0), [1.0], 1) for name in VARIANTS}
    parts = {name: dict.fromkeys(PARTS, 1.0) for name in VARIANTS}
    results = Results(2, timings, parts, [1.0], 1, ends_seconds=0.1, full_flops=1.0, head_tflops=1.0, agreement=0.1)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    write(path, gpu_results.make_rows(bench_gpu.parse_options([]), results))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    report(argparse.Namespace(csv=path, json=False, check=False), "x", "", rows, [])


def write_alone(path: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("initialize_runtime", "shutdown_runtime"):
        patch.setattr(bench_alone, name, lambda *_, **__: None)
    patch.setattr(bench_alone, "step_flops", lambda *_: 1.0)
    patch.setattr(bench_alone, "cpu_seconds", lambda *_: dict.fromkeys(bench_alone.WAYS, SPREAD))
    assert bench_alone.main(["--lengths", "hh", "--batch-size", "2", "--csv", str(path)]) == 0


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "results.csv": write_step,
    "results_flops.csv": write_flops,
    "results_alone.csv": write_alone,
    "results_logprobs.csv": write_logprobs,
    "results_balance.csv": write_balance,
    "results_pipeline.csv": write_pipeline,
    "results_data.csv": write_data,
    "results_convert.csv": write_convert,
    "results_scale.csv": write_scale,
    "results_checkpoint.csv": write_checkpoint,
    "results_start.csv": write_start,
    "results_memory.csv": write_memory,
    "results_lora.csv": write_lora,
    "results_order.csv": write_order,
    "results_gpu.csv": write_gpu,
}


@pytest.mark.parametrize("name", TABLES)
def test_what_a_table_shows_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES[name]
    WRITERS[table.file](tmp_path / table.file, monkeypatch)
    row = next(row for row in read_rows(tmp_path / table.file) if table.takes(row))
    assert all(table.setting(row))
    assert {figure.title: bool(figure.text(row)) for figure in table.figures} == {figure.title: True for figure in table.figures}
