"""Whether a checkpoint's tensors are those of a model, before any of them is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.runtime.agreement import device_of, gather_faults

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")


def match_model(weights: Sequence[dict[str, Any]], stored: Mapping[str, Any], path: Path, group: dist.ProcessGroup) -> None:
    """Check the model's sharded state against what a checkpoint holds. All ranks of ``group`` call it together.

    Transformer Engine's extra state (scales of fp8), which a converted checkpoint or one of another layer spec may lack, is
    removed from ``weights`` where it is not stored.

    Args:
        weights: the ``sharded_state_dict`` of each of the model's chunks.
        stored: torch's metadata by key.
        path: the checkpoint, for messages.
        group: every rank of the job.

    Raises:
        CheckpointError: on every rank: tensors are missing, left over or of other shapes.
    """
    faults: set[str] = set()
    keys = set()
    for chunk, name, item in [(own, name, item) for own in weights for name, item in own.items()]:
        if isinstance(item, ShardedObject):
            if item.unique_key not in stored:
                del chunk[name]
            continue
        for part in _tensors(item):
            keys.add(part.key)
            if fault := _fault(part, stored.get(part.key)):
                faults.add(fault)
    kept = sorted(key for key in stored if isinstance(stored[key], TensorStorageMetadata) and key.startswith(_MODEL_PREFIXES))
    used = torch.tensor([key in keys for key in kept], dtype=torch.int32, device=device_of(group))
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    # A thousand ranks hold the same few keys: what is right need not be told by each.
    faults = {fault for _, found in gather_faults(group, faults or None) for fault in found}
    faults |= {f"{key} is not a tensor of the model" for key, is_used in zip(kept, used.tolist(), strict=True) if not is_used}
    if faults:
        shown = [f"  {fault}" for fault in sorted(faults)[:8]] + ([f"  and {len(faults) - 8} more"] if len(faults) > 8 else [])
        text = "\n".join(shown)
        raise CheckpointError(
            f"{path} is a checkpoint of another model:\n{text}\nThe model is built from the config.json in its hf folder: "
            "was that changed?"
        )


def _tensors(item: Any) -> Iterator[ShardedTensor]:
    yield from nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item]


def _fault(part: ShardedTensor, saved: Any) -> str | None:
    if not isinstance(saved, TensorStorageMetadata):
        return f"{part.key} is missing"
    there, here = tuple(saved.size), tuple(part.global_shape)
    # Vocabularies are padded by layout, so the number of rows may differ.
    same = there[1:] == here[1:] if part.allow_shape_mismatch else there == here
    return None if same else f"{part.key} is {list(there)} there and {list(here)} in the model"
