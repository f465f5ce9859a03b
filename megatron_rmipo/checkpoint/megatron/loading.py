"""Loading a checkpoint into a run: each rank reads its share of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rmipo.checkpoint.megatron.common_state import read_common
from megatron_rmipo.checkpoint.megatron.digests import check_digests_together, damage
from megatron_rmipo.checkpoint.megatron.directory import RANDOM_KEY, find_checkpoint, read_metadata
from megatron_rmipo.checkpoint.megatron.matching import match_model
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, Iteration, read_record
from megatron_rmipo.checkpoint.megatron.run_state import (
    first_cause,
    layout_of,
    model_names,
    optimizer_kind,
    random_object,
    sharded_state,
)
from megatron_rmipo.checkpoint.megatron.unpickling import restricted_unpickling
from megatron_rmipo.checkpoint.shares.adam_state import load_optimizer
from megatron_rmipo.checkpoint.shares.random_state import set_random_state
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.first_failure import lost_a_rank
from megatron_rmipo.runtime.groups import ProcessGroups


def load_checkpoint(
    directory: Path,
    *,
    model: Chunks,
    optimizer: Any | None,
    scheduler: Any | None,
    load_rng: bool,
    groups: ProcessGroups,
    iteration: Iteration | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Load the latest complete checkpoint, or the one asked for, written at any TP, PP, CP, EP and DP.

    From a converted model (``release``) or a checkpoint of another program the weights are taken, and the optimizer's master
    weights follow them. Random states are loaded where the layout is the one that wrote them.

    Args:
        directory: the directory of checkpoints.
        model: this rank's GPTModel, wrapped or not, or its chunks; overwritten.
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
    state = sharded_state(model, with_optimizer, None if weights_only else scheduler, groups, is_loading=True)
    stored = on_every_rank(groups.world, lambda: read_metadata(path).state_dict_metadata)
    common = on_every_rank(groups.world, lambda: read_common(path))
    names = model_names(model)
    match_model([state[name] for name in names], stored, path, groups.world)
    restores_random = load_rng and not weights_only and record.layout == layout_of(groups)
    restores_random &= any(name.startswith(RANDOM_KEY) for name in stored)
    with restricted_unpickling():
        loaded = on_every_rank(groups.world, lambda: _read(path, state, common, groups, in_shares=True))
        if restores_random:
            own = {RANDOM_KEY: random_object(groups, None)}
            # By itself: reading in shares would hand every rank the objects of all.
            found = on_every_rank(groups.world, lambda: _read(path, own, common, groups, in_shares=False))
            loaded[RANDOM_KEY] = found[RANDOM_KEY]
        # Transformer Engine unpickles its state here.
        for name, chunk in zip(names, chunks_of(model), strict=True):
            unwrapped(chunk).load_state_dict(loaded[name], strict=False)
        if with_optimizer is not None:
            load_optimizer(with_optimizer, loaded["optimizer"])
        elif optimizer is not None:
            optimizer.reload_model_params()
    if scheduler is not None and not weights_only:
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if RANDOM_KEY in loaded:
        set_random_state(loaded[RANDOM_KEY])
    return dict(record.train_state)


def _read(path: Path, state: dict[str, Any], common: dict[str, Any], groups: ProcessGroups, *, in_shares: bool) -> dict[str, Any]:
    """What is stored of ``state``; what several ranks ask for, ``in_shares``, one reads and sends to the others."""
    strategy: Any = _AgreedReading(groups.world)
    if in_shares and groups.dp_cp.size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, groups.dp_cp)
    with _telling(path):
        # What integrity it would check, every rank would be told of all tensors. They are compared with the model's before.
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(path), strategy, validate_access_integrity=False, **_common_strategy(common)
        )
    return loaded


class _AgreedReading(TorchDistLoadShardedStrategy):
    """Reads files, and raises on every rank what one meets: not every version of torch does, and others wait for its share."""

    def __init__(self, world: dist.ProcessGroup) -> None:
        super().__init__()
        self._world = world

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any, *strategy: Any) -> Any:
        """As Megatron-Core's; later versions hand on which implementation of asynchronous saves there is."""

        def read() -> Any:
            with _telling(Path(checkpoint_dir)):
                return super(_AgreedReading, self).load(sharded_state_dict, checkpoint_dir, *strategy)

        return on_every_rank(self._world, read)


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        if lost_a_rank(error) or isinstance(error, CheckpointError):
            raise
        # A damaged file raises whatever its bytes happen to say.
        raise CheckpointError(f"{path} cannot be loaded: {first_cause(error)}.") from error


def _common_strategy(common: dict[str, Any]) -> dict[str, Any]:
    """What makes Megatron-Core before 0.19, which looks for the file alone, take a common state that is at hand."""
    try:
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    except ImportError:
        return {}
    strategy = TorchCommonLoadStrategy()
    # A copy: what is loaded is put into it.
    strategy.load_common = lambda checkpoint_dir: dict(common)
    return {"common_strategy": strategy}


def _check_optimizer(path: Path, record: CheckpointRecord, optimizer: Any) -> None:
    kind = optimizer_kind(optimizer)
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
