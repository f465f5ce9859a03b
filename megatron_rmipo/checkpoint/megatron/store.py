"""Saving and resuming training: model, optimizer, scheduler and random states in Megatron-Core's ``torch_dist`` format.

Every public function that takes :class:`ProcessGroups` is called by all ranks together, and raises on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import Module

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets
from megatron_rmipo.checkpoint.megatron.adam_state import load_optimizer, make_adam_state
from megatron_rmipo.checkpoint.megatron.commit import (
    abandon_checkpoint,
    begin_checkpoint,
    commit_checkpoint,
    prune_checkpoints,
)
from megatron_rmipo.checkpoint.megatron.common_state import CONTENT, read_common
from megatron_rmipo.checkpoint.megatron.digests import check_digests_together, damage
from megatron_rmipo.checkpoint.megatron.directory import (
    ASSETS_NAME,
    RANDOM_KEY,
    checkpoint_path,
    find_checkpoint,
    read_metadata,
)
from megatron_rmipo.checkpoint.megatron.hashed_writes import WrittenDigests, digests_of_writes
from megatron_rmipo.checkpoint.megatron.matching import match_model
from megatron_rmipo.checkpoint.megatron.megatron_lm_args import common_of_model
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.random_state import random_state, set_random_state
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, Iteration, read_record
from megatron_rmipo.checkpoint.megatron.unpickling import restricted_unpickling
from megatron_rmipo.checkpoint.whole_directories import check_space, is_full
from megatron_rmipo.errors import CheckpointError, DirectoryTakenError, RmipoError
from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.first_failure import lost_a_rank
from megatron_rmipo.runtime.groups import ProcessGroups

_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException, CheckpointingException)


def save_checkpoint(
    directory: Path,
    iteration: int,
    *,
    model: Module,
    optimizer: Any | None,
    scheduler: Any | None,
    train_state: dict[str, Any],
    config: dict[str, Any],
    assets_dir: Path | None,
    groups: ProcessGroups,
    keep_last: int | None = None,
    owner: DirectoryOwner | None = None,
) -> Path:
    """Write a checkpoint and make it the latest. Returns when it is on the disk.

    The space is checked first, and it is written under another name that is changed when it is whole: whatever goes wrong,
    checkpoints written before stay as they are.

    Args:
        directory: the directory of checkpoints, on a file system every rank sees.
        iteration: optimizer steps taken.
        model: this rank's GPTModel, wrapped or not.
        optimizer: Megatron's optimizer, or None to save weights alone.
        scheduler: Megatron's OptimizerParamScheduler, or None.
        train_state: progress of the run, the same on every rank; plain values that JSON holds.
        config: flags of the run by name, plain values.
        assets_dir: directory of the model's Hugging Face config and tokenizer, copied in; None leaves them out.
        groups: the process groups of this rank.
        keep_last: afterwards remove all but this many of the newest iterations; None keeps all.
        owner: on the first rank, the right to write there; None leaves it to the caller that nobody else does.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: there is no space, the file system refuses, or another run has taken the directory over.
    """
    directory = Path(directory)
    state = _sharded_state(model, optimizer, scheduler, groups, is_loading=False)
    state |= common_of_model(
        unwrapped(model).architecture,
        iteration,
        dtype=unwrapped(model).config.params_dtype,
        tokenizer=None if assets_dir is None else checkpoint_path(directory, iteration).absolute() / ASSETS_NAME,
        run=_arguments_of_run(config, train_state, groups, has_optimizer=optimizer is not None),
    )
    state[RANDOM_KEY] = _random_object(groups, random_state())
    record = CheckpointRecord(iteration, train_state, config, _layout(groups), _optimizer_kind(optimizer))
    num_bytes = _bytes_to_write(state, groups)

    partial: Path | None = None
    written = WrittenDigests()

    def begin() -> Path:
        if owner is not None:
            owner.check()
        check_space(directory, num_bytes)
        return begin_checkpoint(directory, iteration)

    def finish() -> Path:
        assert partial is not None
        if assets_dir is not None:
            copy_hf_assets(Path(assets_dir), partial / ASSETS_NAME)
        if owner is not None:
            owner.check()
        path = commit_checkpoint(partial, record, digests)
        if keep_last is not None:
            prune_checkpoints(directory, keep_last, iteration, in_use=assets_dir)
        return path

    try:
        partial = on_first_rank(groups.world, begin)
        with digests_of_writes() as written:
            dist_checkpointing.save(state, str(partial), content_metadata=dict(CONTENT))
        digests = _gather(written.digests, groups)
        return on_first_rank(groups.world, finish)
    except (*_WRITE_ERRORS, RmipoError) as error:
        if groups.rank == 0 and partial is not None:
            abandon_checkpoint(partial)
        if lost_a_rank(error) or isinstance(error, DirectoryTakenError):
            raise
        raise CheckpointError(
            f"--save {directory}: the checkpoint of step {iteration} was not written: {_first_cause(written.failure or error)}. "
            "Earlier checkpoints are untouched. Free some space, or mend its permissions, and go on from the latest."
        ) from error


def load_checkpoint(
    directory: Path,
    *,
    model: Module,
    optimizer: Any | None,
    scheduler: Any | None,
    load_rng: bool,
    groups: ProcessGroups,
    iteration: Iteration | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Load the latest complete checkpoint, or the one asked for, written at any TP, PP and DP.

    From a converted model (``release``) or a checkpoint of another program the weights are taken, and the optimizer's master
    weights follow them. Random states are loaded where the layout is the one that wrote them.

    Args:
        directory: the directory of checkpoints.
        model: this rank's GPTModel, wrapped or not; overwritten.
        optimizer: Megatron's optimizer, or None to leave its state out.
        scheduler: Megatron's OptimizerParamScheduler, or None.
        load_rng: restore random states.
        groups: the process groups of this rank.
        iteration: None for the latest complete one.
        verify: check the digests of its files first; False where that was done before.

    Returns:
        The ``train_state`` it was saved with; empty for a converted model or one of another program.

    Raises:
        CheckpointError: no complete checkpoint, damaged files, objects that no checkpoint may hold, tensors of another model, or
            optimizer state of another kind or none.
    """

    def find() -> tuple[Path, CheckpointRecord]:
        path, _ = find_checkpoint(Path(directory), iteration)
        return path, read_record(path) or CheckpointRecord("release")

    path, record = on_first_rank(groups.world, find)
    if verify and (damaged := check_digests_together(path, record, groups.world)):
        raise CheckpointError(f"{damage(path, damaged)}. Name another checkpoint.")
    weights_only = record.iteration == "release"
    if optimizer is not None and not weights_only:
        _check_optimizer(path, record, optimizer)
    with_optimizer = None if weights_only else optimizer
    state = _sharded_state(model, with_optimizer, None if weights_only else scheduler, groups, is_loading=True)
    stored = on_every_rank(groups.world, lambda: read_metadata(path).state_dict_metadata)
    common = on_every_rank(groups.world, lambda: read_common(path))
    match_model(state["model"], stored, path, groups.world)
    restores_random = load_rng and not weights_only and record.layout == _layout(groups)
    if restores_random and any(name.startswith(RANDOM_KEY) for name in stored):
        state[RANDOM_KEY] = _random_object(groups, None)
    with restricted_unpickling():
        # What one rank meets while it reads, not every version of torch raises on all.
        loaded = on_every_rank(groups.world, lambda: _read(path, state, common))
        # Transformer Engine unpickles its state here.
        unwrapped(model).load_state_dict(loaded["model"], strict=False)
        if with_optimizer is not None:
            load_optimizer(with_optimizer, loaded["optimizer"])
        elif optimizer is not None:
            optimizer.reload_model_params()
    if scheduler is not None and not weights_only:
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if RANDOM_KEY in loaded:
        set_random_state(loaded[RANDOM_KEY])
    return dict(record.train_state)


def _read(path: Path, state: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path), **_common_strategy(common))
    except (Exception, CheckpointException) as error:
        if lost_a_rank(error):
            raise
        # A damaged file raises whatever its bytes happen to say.
        raise CheckpointError(f"{path} cannot be loaded: {_first_cause(error)}.") from error
    return loaded


def _common_strategy(common: dict[str, Any]) -> dict[str, Any]:
    """What makes Megatron-Core before 0.19, which looks for the file alone, take a common state that is at hand."""
    try:
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    except ImportError:
        return {}
    strategy = TorchCommonLoadStrategy()
    strategy.load_common = lambda checkpoint_dir: common
    return {"common_strategy": strategy}


def _sharded_state(
    model: Module, optimizer: Any | None, scheduler: Any | None, groups: ProcessGroups, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups.dp, **CONTENT}
    weights = unwrapped(model).sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        make_adam_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    return state


def _random_object(groups: ProcessGroups, state: dict[str, Any] | None) -> ShardedObject:
    shape = (groups.pp_size, groups.tp_size, groups.dp_size)
    return ShardedObject(RANDOM_KEY, state, shape, (groups.pp_rank, groups.tp_rank, groups.dp_rank))


def _check_optimizer(path: Path, record: CheckpointRecord, optimizer: Any) -> None:
    kind = _optimizer_kind(optimizer)
    if record.optimizer is None:
        raise CheckpointError(
            f"{path} was saved without the optimizer's state, so the run cannot be resumed from it. "
            "Use --finetune to start a new run from its weights, or --no-load-optim to go on with a fresh optimizer."
        )
    if record.optimizer != kind:
        raise CheckpointError(
            f"{path} holds the state of a {record.optimizer}, but this run uses a {kind}. "
            "Give --use-distributed-optimizer, --bf16 and --optimizer as in the run that saved it, or --no-load-optim."
        )


def _optimizer_kind(optimizer: Any | None) -> str | None:
    if optimizer is None:
        return None
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return "+".join(type(part).__name__ for part in parts)


def _layout(groups: ProcessGroups) -> dict[str, int]:
    return {"tp": groups.tp_size, "pp": groups.pp_size, "dp": groups.dp_size}


def _arguments_of_run(
    config: dict[str, Any], train_state: dict[str, Any], groups: ProcessGroups, *, has_optimizer: bool
) -> dict[str, Any]:
    """What Megatron-LM calls the run's layout, progress and flags."""
    same_name = (
        "seq_length",
        "global_batch_size",
        "make_vocab_size_divisible_by",
        "sequence_parallel",
        "use_distributed_optimizer",
    )
    return {
        **{name: config[name] for name in same_name if name in config},
        "tensor_model_parallel_size": groups.tp_size,
        "pipeline_model_parallel_size": groups.pp_size,
        "data_parallel_size": groups.dp_size,
        "expert_model_parallel_size": groups.ep.size(),
        "expert_tensor_parallel_size": groups.expert_tp.size(),
        "world_size": groups.world_size,
        "consumed_train_samples": train_state.get("consumed_pairs", 0),
        "no_save_optim": not has_optimizer,
    }


def _bytes_to_write(state: dict[str, Any], groups: ProcessGroups) -> int:
    num_bytes = 0
    for item in nested_values(state):
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and is_main_replica(item.replica_id) and item.data is not None:
            num_bytes += item.data.numel() * item.data.element_size()
    total = torch.tensor([num_bytes], dtype=torch.int64, device=_device(groups))
    dist.all_reduce(total, group=groups.world)
    return int(total.item())


def _device(groups: ProcessGroups) -> torch.device:
    on_gpu = dist.get_backend(groups.world) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _gather(digests: dict[str, str], groups: ProcessGroups) -> dict[str, str]:
    """All ranks' digests on the first rank, nothing elsewhere."""
    parts: list[dict[str, str]] | None = [{}] * groups.world_size if groups.rank == 0 else None
    dist.gather_object(digests, parts, group=groups.world, group_dst=0)
    return {name: digest for part in parts or [] for name, digest in part.items()}


def _first_cause(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error of torch's or Megatron's checkpointing."""
    if isinstance(error, CheckpointException):
        failures = [failure[0] for failure in error.failures.values()]
        return _first_cause(failures[0]) if failures else "another rank failed"
    cause = error.__cause__ or (error.__context__ if isinstance(error.__context__, OSError) else None) or error
    text = (str(cause).rstrip(".") or type(cause).__name__).splitlines()[0]
    return f"the disk is full ({text})" if is_full(cause) else text
