"""Layers over stages and chunks, by our own rules and by Megatron's, over all flags that either of them takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import (
    best_split,
    num_chunks,
    present_split,
    split_flag_problems,
    split_problems,
    stage_layers,
    stage_shares,
)
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime

SIZES = (None, 1, 2, 4)


def of_megatron(num_layers: int, parallel: ParallelConfig) -> list[list[range]] | None:
    """Layers by stage, by chunk, as Megatron's model has them; None where it refuses."""
    stages, chunks = parallel.pipeline_model_parallel_size, num_chunks(num_layers, parallel)
    settings: dict[str, Any] = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
    }
    try:
        # An even split it checks when the layers are built.
        config = TransformerConfig(
            num_layers=num_layers, hidden_size=8, num_attention_heads=2, pipeline_dtype=torch.float32, **settings
        )
        found = []
        for rank in range(stages):
            found.append([])
            for chunk in range(chunks):
                vp_stage = chunk if chunks > 1 else None
                start, size = (
                    get_transformer_layer_offset(config, vp_stage, rank),
                    get_num_layers_to_build(config, vp_stage, rank),
                )
                found[-1].append(range(start, start + size))
    except (ValueError, AssertionError, ZeroDivisionError):
        return None
    # More layers at both ends than there are it does not notice.
    return None if any(layers.stop < layers.start for chunks in found for layers in chunks) else found


def combinations() -> Iterator[tuple[int, ParallelConfig]]:
    for num_layers, stages in itertools.product((4, 7, 10, 16), (2, 3, 4)):
        for first, last, chunks in itertools.product(SIZES, SIZES, (None, 2, 3)):
            yield (
                num_layers,
                ParallelConfig(
                    pipeline_model_parallel_size=stages,
                    decoder_first_pipeline_num_layers=first,
                    decoder_last_pipeline_num_layers=last,
                    num_virtual_stages_per_pipeline_rank=chunks,
                ),
            )
        for embedding, loss, chunks in itertools.product((False, True), (False, True), (None, 2, 3)):
            yield (
                num_layers,
                ParallelConfig(
                    pipeline_model_parallel_size=stages,
                    account_for_embedding_in_pipeline_split=embedding,
                    account_for_loss_in_pipeline_split=loss,
                    num_virtual_stages_per_pipeline_rank=chunks,
                ),
            )


def test_layers_are_split_as_megatron_splits_them_and_refused_where_it_refuses() -> None:
    initialize_runtime(1, 1)
    taken = refused = 0
    for num_layers, parallel in combinations():
        assert list(split_flag_problems(parallel)) == []
        theirs = of_megatron(num_layers, parallel)
        problems = list(split_problems(num_layers, parallel))
        assert bool(problems) == (theirs is None), (num_layers, parallel, problems)
        if theirs is None:
            refused += 1
            continue
        taken += 1
        assert stage_layers(num_layers, parallel) == theirs, (num_layers, parallel)
        # Each layer once, chunk after chunk.
        in_order = [layer for chunks in zip(*theirs, strict=True) for layers in chunks for layer in layers]
        assert in_order == list(range(num_layers))
        assert sum(map(sum, stage_shares(num_layers, parallel))) == pytest.approx(1.0)
    assert taken > 60
    assert refused > 60
    shutdown_runtime()


def test_layers_of_a_chunk_say_how_many_chunks_there_are() -> None:
    split = lambda each, **more: ParallelConfig(  # noqa: E731
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=each, **more
    )
    assert num_chunks(12, split(2)) == 3
    assert num_chunks(10, split(3, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)) == 2
    assert stage_layers(8, split(2)) == [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]
    assert "6 layers of a stage are no multiple of 4" in next(split_problems(12, split(4)))
    assert "would be one chunk" in next(split_problems(12, split(6)))


def test_a_remedy_is_one_that_works() -> None:
    for num_layers, parallel in itertools.islice(combinations(), 0, None, 7):
        for problem in split_problems(num_layers, parallel):
            words = problem.split("would work: ")[1].split(", or ")[0].split()
            fields: dict[str, Any] = {}
            for flag, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
                if flag.startswith("--") and flag != "--":
                    fields[flag[2:].replace("-", "_")] = True if following.startswith("--") else int(following.rstrip(","))
            if "without" not in words:
                assert list(split_problems(num_layers, ParallelConfig(**fields))) == [], problem


def test_the_best_split_evens_out_the_output_layer() -> None:
    even = ParallelConfig(pipeline_model_parallel_size=4)
    assert present_split(32, 2.5, even).stage_costs == (8, 8, 8, 10.5)
    found = best_split(32, 2.5, even)
    assert found is not None
    # 34.5 in all, so 8.625 a stage at best.
    assert found.stage_costs == (9, 9, 9, 7.5)
    assert found.flags == "--decoder-last-pipeline-num-layers 5"
    assert stage_layers(32, found.parallel)[-1] == [range(27, 32)]
    # As good without a flag.
    assert best_split(32, 0.0, even) == present_split(32, 0.0, even)
    assert best_split(32, 0.0, even).flags == ""  # type: ignore[union-attr]
    # 31 layers and an output layer as heavy as one.
    assert best_split(31, 1.0, even).flags == "--account-for-loss-in-pipeline-split"  # type: ignore[union-attr]
    assert best_split(3, 1.0, even).flags == "--account-for-loss-in-pipeline-split"  # type: ignore[union-attr]
    assert best_split(2, 1.0, even).stage_costs == (0, 1, 1, 1)  # type: ignore[union-attr]
    assert best_split(1, 1.0, even) is None


def test_the_best_split_keeps_the_chunks() -> None:
    chunked = ParallelConfig(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=2)
    found = best_split(30, 2.0, chunked)
    assert found is not None
    assert num_chunks(30, found.parallel) == 2
    assert max(found.stage_costs) == 8
    assert list(split_problems(30, found.parallel)) == []


def test_stages_that_hold_nothing_are_known_by_their_shares() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, account_for_loss_in_pipeline_split=True)
    assert stage_shares(1, parallel) == ((1.0,), (0.0,))
    assert stage_layers(1, parallel) == [[range(1)], [range(1, 1)]]
