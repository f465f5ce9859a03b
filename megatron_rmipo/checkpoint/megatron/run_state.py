"""A run's state as Megatron-Core takes it to write or to read: what lies in a checkpoint, and of which kind and layout it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rmipo.checkpoint.megatron.common_state import CONTENT
from megatron_rmipo.checkpoint.megatron.directory import RANDOM_KEY
from megatron_rmipo.checkpoint.shares.adam_state import sharded_optimizer
from megatron_rmipo.checkpoint.shares.adapter_state import adapter_state
from megatron_rmipo.checkpoint.whole_directories import is_full
from megatron_rmipo.model.lora.switch import is_adapted
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.runtime.groups import ProcessGroups, current_device

CHECKPOINTING_ERRORS = (OSError, RuntimeError, CheckpointException, CheckpointingException)


def model_names(model: Chunks) -> list[str]:
    """What Megatron-LM calls the parts of a checkpoint that this rank's chunks are; their tensors' keys do not depend on it."""
    chunks = chunks_of(model)
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def sharded_state(
    model: Chunks, optimizer: Any | None, scheduler: Any | None, groups: ProcessGroups, *, is_loading: bool
) -> dict[str, Any]:
    """Model, optimizer and scheduler of this rank. All ranks call it together.

    Args:
        model: this rank's GPTModel, wrapped or not, or its chunks.
        optimizer: Megatron's optimizer, or None.
        scheduler: Megatron's OptimizerParamScheduler, or None.
        groups: the process groups of this rank.
        is_loading: whether it is to be loaded into.
    """
    metadata = {"dp_cp_group": groups.dp_cp, **CONTENT}
    weights = {
        name: _sharded_weights(unwrapped(chunk), groups, metadata)
        for name, chunk in zip(model_names(model), chunks_of(model), strict=True)
    }
    state: dict[str, Any] = dict(weights)
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer(optimizer, weights, is_loading=is_loading, metadata=metadata)
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def _sharded_weights(chunk: Any, groups: ProcessGroups, metadata: dict[str, Any]) -> dict[str, Any]:
    """What is trained: all of a chunk, or its adapter."""
    if is_adapted(chunk):
        return adapter_state(chunk, groups, metadata)
    sharded: dict[str, Any] = chunk.sharded_state_dict(metadata=metadata)
    return sharded


def random_object(groups: ProcessGroups, state: dict[str, Any] | None) -> ShardedObject:
    """This rank's random states as an object of the checkpoint; None to be loaded into."""
    shape = (groups.pp_size, groups.tp_size, groups.dp_cp.size())
    return ShardedObject(RANDOM_KEY, state, shape, (groups.pp_rank, groups.tp_rank, groups.dp_cp.rank()))


def optimizer_kind(optimizer: Any | None) -> str | None:
    """What kind of optimizer's state it is, None for none."""
    if optimizer is None:
        return None
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return "+".join(type(part).__name__ for part in parts)


def layout_of(groups: ProcessGroups) -> dict[str, int]:
    """The sizes that random states depend on."""
    # Named where there is such: checkpoints of before know no other layouts.
    context = {"cp": groups.cp_size} if groups.cp_size > 1 else {}
    return {"tp": groups.tp_size, "pp": groups.pp_size, "dp": groups.dp_size, **context}


def arguments_of_run(
    config: dict[str, Any], train_state: dict[str, Any], groups: ProcessGroups, *, num_chunks: int, has_optimizer: bool
) -> dict[str, Any]:
    """What Megatron-LM calls the run's layout, progress and flags."""
    same_name = (
        "seq_length",
        "global_batch_size",
        "make_vocab_size_divisible_by",
        "sequence_parallel",
        "use_distributed_optimizer",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    return {
        **{name: config[name] for name in same_name if name in config},
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "context_parallel_size": groups.cp_size,
        "virtual_pipeline_model_parallel_size": num_chunks if num_chunks > 1 else None,
        "data_parallel_size": groups.dp_size,
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expert_tp.size(),
        "world_size": groups.world_size,
        "consumed_train_samples": train_state.get("consumed_pairs", 0),
        "no_save_optim": not has_optimizer,
    }


def bytes_to_write(state: dict[str, Any], groups: ProcessGroups) -> int:
    """Bytes of all tensors that the ranks will write together. All ranks call it together."""
    num_bytes = 0
    for item in nested_values(state):
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and is_main_replica(item.replica_id) and item.data is not None:
            num_bytes += item.data.numel() * item.data.element_size()
    total = torch.tensor([num_bytes], dtype=torch.int64, device=current_device())
    dist.all_reduce(total, group=groups.world)
    return int(total.item())


def first_cause(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error of torch's or Megatron's checkpointing."""
    if isinstance(error, CheckpointException):
        failures = [failure[0] for failure in error.failures.values()]
        return first_cause(failures[0]) if failures else "another rank failed"
    cause = error.__cause__ or (error.__context__ if isinstance(error.__context__, OSError) else None) or error
    text = (str(cause).rstrip(".") or type(cause).__name__).splitlines()[0]
    return f"the disk is full ({text})" if is_full(cause) else text
