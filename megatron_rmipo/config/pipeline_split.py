"""Which layers each pipeline stage holds, from the flags alone: Megatron's rules, in numbers that anybody may ask for."""

from __future__ import annotations

from megatron_rmipo.config.parallel_flags import ParallelConfig


def num_chunks(num_layers: int, parallel: ParallelConfig) -> int:
    """Chunks of layers that each stage holds: one, but in an interleaved pipeline."""
    if parallel.num_virtual_stages_per_pipeline_rank is not None:
        return parallel.num_virtual_stages_per_pipeline_rank
    each = parallel.num_layers_per_virtual_pipeline_stage
    return 1 if each is None else max(1, max(stage_slots(num_layers, parallel)) // each)


def stage_slots(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """For each stage how many layers it has room for, embedding and output layer among them where they count as one."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    counted = num_layers + parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    others = stages - (first is not None) - (last is not None)
    middle = (counted - (first or 0) - (last or 0)) // others if others else 0
    slots = [middle] * stages
    if first is not None:
        slots[0] = first
    if last is not None:
        slots[-1] = last
    return slots


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[list[range]]:
    """Layers by stage, by chunk, counted from 0.

    The flags must fit the number of layers (see :func:`megatron_rmipo.model.layout_problems.layout_problems`).

    Args:
        num_layers: of the model.
        parallel: the flags.
    """
    chunks, slots = num_chunks(num_layers, parallel), stage_slots(num_layers, parallel)
    layers: list[list[range]] = [[] for _ in slots]
    start = 0
    for chunk in range(chunks):
        for stage, room in enumerate(slots):
            size = room // chunks
            if parallel.account_for_embedding_in_pipeline_split and chunk == stage == 0:
                size -= 1
            if parallel.account_for_loss_in_pipeline_split and (chunk, stage) == (chunks - 1, len(slots) - 1):
                size -= 1
            layers[stage].append(range(start, start + size))
            start += size
    return layers
