"""Packs in flight against Megatron's own numbers, and by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_rmipo.memory.in_flight import packs_in_flight


@pytest.mark.parametrize(
    ("stages", "chunks", "packs"), [(2, 1, 5), (4, 1, 3), (4, 1, 9), (2, 2, 6), (3, 2, 3), (4, 3, 8), (4, 2, 4)]
)
def test_as_many_as_megatron_warms_up_with_and_one(stages: int, chunks: int, packs: int) -> None:
    for stage in range(stages):
        group: Any = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        place: Any = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        total, _, warm_up, _ = get_pp_rank_microbatches(packs, chunks, stages, p2p_communicator=place)
        moments = packs_in_flight(stage, stages, chunks, packs)
        assert max(map(sum, moments)) == min(warm_up + 1, total)
        assert all(len(one) == chunks for one in moments)


def test_by_hand() -> None:
    assert packs_in_flight(0, 1, 1, 7) == ((1,),)
    assert [packs_in_flight(stage, 4, 1, None) for stage in range(4)] == [((4,),), ((3,),), ((2,),), ((1,),)]
    # Two stages of two chunks: forwards of 0 0 1 1 and one more, then a backward for each, chunk 1's first.
    assert packs_in_flight(0, 2, 2, 2) == ((2, 2),)
    assert set(packs_in_flight(0, 2, 2, None)) == {(3, 2), (4, 1)}
    assert set(packs_in_flight(1, 2, 2, None)) == {(2, 1), (3, 0)}
    # No pass has more packs than it has.
    assert packs_in_flight(0, 8, 1, 3) == ((3,),)
