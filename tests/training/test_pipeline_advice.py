"""What a run with pipeline stages says of their waiting, and what it advises, from lengths alone."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, DataConfig, TrainingConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.pipeline_bubble import Stages
from megatron_rmipo.data.batches.sizes import CostModel
from megatron_rmipo.training.pipeline_advice import tell_pipeline
from tests.integration.problem import collection, make_pairs

NUM_PAIRS = 96


def said(
    *,
    pairs: int,
    num_stages: int = 4,
    dp_size: int = 2,
    least: int | None = 2,
    head: float = 0.0,
    rank: int = 0,
    tokens: int = 40_000,
) -> list[str]:
    """Lines of a run with equal pairs of 3,000 tokens."""
    data = collection(make_pairs(NUM_PAIRS))
    data.stores[0].lengths[:] = [1002, 1000, 1000]  # type: ignore[attr-defined]
    data.lengths = np.tile([1002, 1000, 1000], (NUM_PAIRS, 1))
    cost = CostModel(1.0, 0.0, head)
    layout = BatchLayout(0, dp_size, tokens, cost, stages=Stages.even(num_stages), min_packs_per_stage=least)
    lines: list[str] = []
    run: Any = SimpleNamespace(
        config=Config(
            parallel=ParallelConfig(pipeline_model_parallel_size=num_stages),
            data=DataConfig(seq_length=2048),
            training=TrainingConfig(global_batch_size=pairs),
        ),
        state=SimpleNamespace(policy=SimpleNamespace(architecture=SimpleNamespace(num_layers=24))),
        groups=SimpleNamespace(rank=rank, pp_size=num_stages),
        pairs=BatchBuilder(data, layout),
        order=PairOrder(NUM_PAIRS, 3),
        progress=SimpleNamespace(consumed_pairs=0),
        total_pairs=NUM_PAIRS,
        reporter=SimpleNamespace(say=lines.append, warn=lambda text: lines.append(f"warning: {text}")),
    )
    tell_pipeline(run)
    return lines


def test_nothing_is_said_without_stages_and_by_the_first_rank_alone() -> None:
    assert said(pairs=48, num_stages=1) == []
    assert said(pairs=48, rank=1) == []


def test_a_short_wait_is_said_and_not_warned_of() -> None:
    # 3 of 12 + 3 slots.
    words = "pipeline: about 20% of a step idle (20% if packs and stages were even), 12 micro-batches a rank"
    assert said(pairs=48, least=3) == [words]


def test_a_long_wait_is_warned_of_with_the_flags_that_help_and_what_they_would_do() -> None:
    line, warning = said(pairs=48)
    assert line == "pipeline: about 27% of a step idle (27% if packs and stages were even), 8 micro-batches a rank"
    assert warning.startswith("warning: pipeline stages stand still for about 27% of a step; flags that would change it")
    # 24 pairs in 12 packs of a rank; 8 of 2 stages and 4 replicas, with half as many pairs in each.
    assert "--min-microbatches-per-stage 3 (20%)" in warning
    assert "--global-batch-size 96 with --min-microbatches-per-stage 4 (16%)" in warning
    assert "--pipeline-model-parallel-size 2, where memory allows (20%)" in warning
    assert "of its own" not in warning
    assert "output layer" not in warning


def test_with_as_many_packs_as_take_least_more_of_them_are_not_advised() -> None:
    # 8 pairs of 3,000 tokens a rank: sqrt(24,000 * 3 / 500) = 12 packs, and no more than there are pairs.
    line, warning = said(pairs=16, least=None)
    assert line.endswith("8 micro-batches a rank")
    assert "--min-microbatches-per-stage" not in warning
    assert "--global-batch-size 32 (" in warning
    assert said(pairs=48, least=None)[0].endswith("21 micro-batches a rank")


def test_smaller_packs_are_advised_only_where_they_do_not_cost_more_than_they_save() -> None:
    _, warning = said(pairs=48, least=0, tokens=24_000)
    assert re.search(r"--min-microbatches-per-stage (3|4|6) ", warning)
    # The cut that was asked for is finer than half the tokens would make it.
    assert "--tokens-per-microbatch" not in said(pairs=48)[1]
    assert "--tokens-per-microbatch 12000 (" in warning


def test_too_few_pairs_are_named() -> None:
    _, warning = said(pairs=8)
    assert "A rank has about 4 pairs of a step, each in a micro-batch of its own already" in warning
    assert "--min-microbatches-per-stage 3 " not in warning
    assert "--global-batch-size 32 with --min-microbatches-per-stage 8 (16%)" in warning


def test_an_output_layer_that_the_other_stages_wait_for_is_named() -> None:
    # 3,000 tokens of layers, 2,000 scored: the head is half as much as all layers.
    line, split, warning = said(pairs=48, head=0.75)
    assert re.search(r"about 5\d% of a step idle \(27% if", line)
    assert "The last stage, with the output layer, has 2.00 times a stage's mean work" in warning
    # Of 24 layers and the worth of 12 the last stage has 18; with a single layer beside it 13.
    assert split == (
        "pipeline: the slowest stage does the work of 18.0 layers, the output layer being worth 12.0; with "
        "--decoder-first-pipeline-num-layers 7 --decoder-last-pipeline-num-layers 1 it would be 13.0"
    )
