"""How many packs each chunk of a pipeline stage holds activations of at a time, as Megatron's schedules run them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from megatron_rmipo.data.batches.pipeline_bubble import Stages, Work, stage_order

# A schedule repeats itself: more packs for each stage than these never wait for their backward.
_STAGES_OF_PACKS = 4


@functools.lru_cache(maxsize=4096)
def packs_in_flight(stage: int, stages: int, chunks: int, num_microbatches: int | None) -> tuple[tuple[int, ...], ...]:
    """Packs whose activations are kept, by chunk, at each moment that may be the one with most.

    One forward, one backward, after a warm-up whose length is Megatron's: as many forwards as stages come after this one, and in
    an interleaved pipeline twice as many, after ``chunks - 1`` groups of one pack for each stage.

    Args:
        stage: from 0.
        stages: of the pipeline.
        chunks: that each stage holds.
        num_microbatches: of a gradient pass; None: enough that the pipeline is full.
    """
    most = _STAGES_OF_PACKS * stages
    packs = most if num_microbatches is None else min(num_microbatches, most)
    if stages == 1 or packs < 1:
        return ((1,) * chunks,)
    if chunks == 1:
        return ((min(stages - stage, packs),),)
    # An interleaved schedule runs groups of one pack for each stage.
    packs = -(-packs // stages) * stages
    return tuple(_fullest(stage_order(stage, Stages.even(stages, chunks), packs, backward=True), chunks))


def _fullest(order: Sequence[Work], chunks: int) -> Iterator[tuple[int, ...]]:
    """Of all moments after a forward those at which no other one has as many packs of every chunk."""
    held, moments = [0] * chunks, set()
    for is_backward, _, chunk in order:
        held[chunk] += -1 if is_backward else 1
        if not is_backward:
            moments.add(tuple(held))
    for one in moments:
        if not any(other != one and all(more >= less for more, less in zip(other, one, strict=True)) for other in moments):
            yield one
