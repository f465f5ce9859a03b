"""How many packs a stage keeps activations of."""

from __future__ import annotations

from megatron_rmipo.memory.in_flight import packs_in_flight


def test_a_stage_keeps_a_pack_for_each_stage_behind_it_and_the_one_at_hand() -> None:
    assert [packs_in_flight(stage, 4, 1, 3) for stage in range(4)] == [((3,),), ((3,),), ((2,),), ((1,),)]
    assert packs_in_flight(0, 4, 1, None) == ((4,),)


def test_chunks_keep_parts_of_packs() -> None:
    # 3 behind twice, 4 for the other chunk, and the one at hand: 11 halves.
    assert [max(map(sum, packs_in_flight(stage, 4, 2, 8))) for stage in range(4)] == [11, 9, 7, 5]
