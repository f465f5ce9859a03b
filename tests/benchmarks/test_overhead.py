"""What a step does beside model and optimizer is told apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from benchmarks.bench_step import parse_options
from benchmarks.inputs import read_pairs
from benchmarks.overhead import overhead_share
from benchmarks.sides import build_state, our_step
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.runtime.groups import initialize_runtime
from tests.benchmarks.test_bench_gpu import ARCH
from tests.harness import run_distributed


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The same after so many CPU seconds of waiting."""

    def call(*args: Any, **kwargs: Any) -> Any:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return function(*args, **kwargs)

    return call


def shares() -> list[float]:
    """Of a step as it is, of one that lays out slowly, and of one with a slow model."""
    groups = initialize_runtime(1, 1, seed=1)
    options = parse_options(["--lengths", "hh", "--shrink", "8", "--num-pairs", "4", "--vocab-size", str(ARCH.vocab_size)])
    state = build_state(ARCH, groups, bf16=False)
    step = our_step(state, read_pairs(options), "rmipo", groups, tokens_per_microbatch=512)
    step()
    found = [overhead_share(step, state)]
    for owner, name in ((BatchBuilder, "build"), (state.model.chunks[0], "forward")):
        with mock.patch.object(owner, name, slowed(getattr(owner, name), 3.0)):
            found.append(overhead_share(step, state))
    return found


@pytest.mark.dist
def test_what_is_neither_model_nor_optimizer_is_told_apart() -> None:
    ((plain, slow_build, slow_model),) = run_distributed(shares, 1)
    assert 0 < slow_model < plain < slow_build < 1
    assert slow_build > 0.5
