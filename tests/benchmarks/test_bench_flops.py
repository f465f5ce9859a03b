"""The FLOP benchmark: what it counts without computing is what a formula by hand gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_flops
from benchmarks.inputs import LLAMA_3_8B, random_pairs
from benchmarks.sides import batch_builder
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

HIDDEN, FFN, HEADS, GROUPS, CHANNELS, VOCAB, LAYERS = 24, 40, 6, 2, 4, 97, 5
SMALL = dataclasses.replace(
    LLAMA_3_8B,
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=HEADS,
    num_query_groups=GROUPS,
    kv_channels=CHANNELS,
    vocab_size=VOCAB,
)
LENGTHS = [(7, 5, 3), (11, 2, 9), (4, 6, 6)]


def expected(objective: str) -> float:
    """Layers forward and twice backward per token; attention as squares; the output layer forward, backward, and once again."""
    linear = 2 * (HIDDEN * (HEADS + 2 * GROUPS) * CHANNELS + HEADS * CHANNELS * HIDDEN + 3 * HIDDEN * FFN)
    score, head = 4 * HEADS * CHANNELS, 2 * HIDDEN * VOCAB
    total = 0
    for prompt, chosen, rejected in LENGTHS:
        # The last token of a response predicts nothing and is left out.
        own = (chosen - 1, rejected - 1)
        # The prompt and the chosen response are one segment, which the rejected one reads the prompt of.
        area = (prompt + own[0]) ** 2 + own[1] * (prompt + own[1])
        total += 3 * LAYERS * (linear * (prompt + sum(own)) + score * area) + 4 * head * (chosen + rejected)
        if objective == "rmipo":
            # Each response after a start token, forward only.
            total += LAYERS * (linear * (chosen + rejected) + score * (chosen**2 + rejected**2)) + head * (chosen + rejected)
    return total


def counted(objective: str) -> float:
    groups = initialize_runtime(1, 1, seed=1)
    pairs = random_pairs(np.array(LENGTHS), VOCAB, np.random.default_rng(1))
    batch = batch_builder(pairs, SMALL, build_objective(objective, {}), 24).build(np.arange(len(pairs)))
    assert len(batch.conditional) == 3
    flops = bench_flops.step_flops(SMALL, batch, groups)
    shutdown_runtime()
    return flops


@pytest.mark.dist
@pytest.mark.parametrize("objective", ["rmipo", "simpo"])
def test_counted_flops_are_those_of_the_arithmetic(objective: str) -> None:
    assert run_distributed(counted, 1, objective) == [expected(objective)]


def count_two_pairs(path: str) -> int:
    bench_flops.GOAL_SETTINGS["batch_size"] = 2
    return bench_flops.main(["--batch-size", "2", "--lengths", "hh", "--csv", path, "--check"])


@pytest.mark.dist
def test_the_goal_is_held_and_a_line_appended(tmp_path: Path) -> None:
    path = tmp_path / "flops.csv"
    assert run_distributed(count_two_pairs, 1, str(path)) == [0]
    assert len(path.read_text().splitlines()) == 2


def test_a_goal_for_each_of_the_recorded_lengths() -> None:
    def verdicts(**other: float | str) -> list[tuple[float, float, bool]]:
        meant: dict[str, float | str] = {
            "objective": "rmipo",
            "batch_size": 128,
            "tokens_per_microbatch": 8192,
            "seq_length": 2048,
            "seed": 1,
        }
        ratios = (("hh", 1.04), ("own.jsonl", 1.0))
        goals = bench_flops.goals([{**meant, "lengths": name, "ratio": ratio, **other} for name, ratio in ratios])
        return [(goal.limit, goal.measured, goal.reached) for goal in goals]

    assert verdicts() == [(1.03, 1.04, False)]
    for name, value in (("objective", "simpo"), ("batch_size", 64), ("tokens_per_microbatch", 4096), ("seq_length", 1024)):
        assert verdicts(**{name: value}) == []
