"""The benchmark of responses alone: three ways to lay out the same pairs, counted by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import bench_alone
from benchmarks.bench_flops import step_flops
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.benchmarks.test_bench_flops import CHANNELS, HEADS, HIDDEN, LAYERS, LENGTHS, SMALL, VOCAB, expected
from tests.harness import run_distributed


def counted() -> dict[str, float]:
    groups = initialize_runtime(1, 1, seed=1)
    options = bench_alone.parse_options(["--tokens-per-microbatch", "60"])
    found = {}
    for way in bench_alone.WAYS:
        found[way] = step_flops(SMALL, bench_alone.batch_of(way, SMALL, np.array(LENGTHS), options), groups)
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_rows_cost_the_layers_backward_and_the_output_layer_nothing_more() -> None:
    found = run_distributed(counted, 1)[0]
    assert found["pass"] == expected("rmipo")
    assert found["none"] == expected("simpo")
    head = 2 * HIDDEN * VOCAB * sum(chosen + rejected for _, chosen, rejected in LENGTHS)
    assert found["rows"] - found["none"] - head == 3 * (found["pass"] - found["none"] - head)


def timed() -> dict[str, float]:
    groups = initialize_runtime(1, 1, seed=1)
    bench_alone.SMALL = dataclasses.replace(SMALL, num_layers=LAYERS, num_attention_heads=HEADS, kv_channels=CHANNELS)
    options = bench_alone.parse_options(["--tokens-per-microbatch", "60", "--repeats", "1"])
    found = {way: spread.p50 for way, spread in bench_alone.cpu_seconds(np.array(LENGTHS), options, groups).items()}
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_every_way_is_timed_where_losses_agree() -> None:
    found = run_distributed(timed, 1)[0]
    assert list(found) == list(bench_alone.WAYS)
    assert min(found.values()) > 0
