"""What a save exchanges is what it needs, and the first rank's planning refuses tensors that are not covered once."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType


def plan(start: int, stop: int) -> SavePlan:
    """That of a rank that writes rows of a tensor of seven by three."""
    offsets, sizes = torch.Size([start, 0]), torch.Size([stop - start, 3])
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(), torch.Size([7, 3]))
    return SavePlan([WriteItem(MetadataIndex("weight", offsets), WriteItemType.SHARD, tensor_data=data)])


def test_a_tensor_that_is_not_covered_once_and_whole_is_refused_by_the_planning_of_the_first_rank() -> None:
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.create_global_plan([plan(0, 4), plan(4, 7)])
    for second in (plan(3, 7), plan(5, 7), plan(4, 8)):
        with pytest.raises(ValueError, match="Failed to validate global plan"):
            planner.create_global_plan([plan(0, 4), second])
