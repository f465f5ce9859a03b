"""The one checkpoint that a run starts from: decided once for all ranks, and compared with its digests before it is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_rmipo.checkpoint.makers import KNOWN_FAMILIES, Maker
from megatron_rmipo.checkpoint.megatron.commit import write_tracker
from megatron_rmipo.checkpoint.megatron.digests import check_digests_together, damage, refuse_unseen
from megatron_rmipo.checkpoint.megatron.directory import (
    METADATA_NAME,
    Choice,
    checkpoint_path,
    choose_checkpoint,
    nothing_complete,
    read_tracker,
)
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, Iteration, read_record
from megatron_rmipo.checkpoint.source import ModelSource, hf_source, source_at
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.runtime.agreement import on_each_rank_alone, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.messages import warn


def settle_source(
    find: Callable[[], ModelSource],
    groups: ProcessGroups,
    *,
    verify: bool,
    owner: DirectoryOwner | None = None,
    maker: Maker = KNOWN_FAMILIES,
) -> ModelSource:
    """Decide which model is loaded. All ranks call it together.

    The first rank looks and chooses; a run whose ranks had found different checkpoints was refused before. Where a file of the
    choice is damaged, the one before is taken, and the file is named.

    Args:
        find: what the flags name, looked for anew: a run that was waited for may have saved meanwhile.
        groups: the process groups of this rank.
        verify: compare a checkpoint's files with their digests, shared out over the ranks.
        owner: on the first rank, of the directory that the run saves to. If the checkpoint lies there, the tracker file is made
            to name it, so that the next save knows which iterations are of a branch that was left.
        maker: of what ``find`` finds.

    Returns:
        The same on every rank, ``checked`` where that was asked for.

    Raises:
        CheckpointError: on every rank: no whole checkpoint is left, or a rank does not see it.
        RmipoError: on every rank: as ``find``.
    """

    def named() -> tuple[Path | None, Path | None]:
        found = find()
        # With adapters that are new, it is the model beneath that is found.
        one = found.base if found.base is not None and found.checkpoint is None else found
        return one.hf_weights, one.checkpoint

    hf_weights, directory = on_first_rank(groups.world, named)
    if directory is None:
        assert hf_weights is not None
        return on_each_rank_alone(groups.world, partial(hf_source, hf_weights, maker=maker))
    iteration = _settle_iteration(directory, groups, verify=verify)

    def follow() -> None:
        if owner is not None and owner.directory.resolve() == directory.resolve() and read_tracker(directory) != iteration:
            write_tracker(directory, iteration)

    on_first_rank(groups.world, follow)
    # The first rank has looked at every file of it; that this one lies where the others look, one file tells.
    refuse_unseen([checkpoint_path(directory, iteration) / METADATA_NAME], groups.world)
    settled = on_each_rank_alone(groups.world, partial(source_at, directory, iteration, maker=maker))
    return dataclasses.replace(settled, checked=verify)


def _settle_iteration(directory: Path, groups: ProcessGroups, *, verify: bool) -> Iteration:
    before: Iteration | None = None
    while True:
        iteration, record = on_first_rank(groups.world, partial(_choose, directory, before))
        if not verify or record is None:
            return iteration
        path = checkpoint_path(directory, iteration)
        damaged = check_digests_together(path, record, groups.world)
        if not damaged:
            return iteration
        if iteration == "release":
            raise CheckpointError(f"{damage(path, damaged)}. Convert the model again.")
        if groups.rank == 0:
            warn(f"{damage(path, damaged)}. The checkpoint before it is looked for.")
        before = iteration


def _choose(directory: Path, before: Iteration | None) -> tuple[Iteration, CheckpointRecord | None]:
    choice: Choice = choose_checkpoint(directory, before)
    for line in choice.passed_over:
        warn(line)
    if choice.iteration is None:
        others = "" if before is None else f"{checkpoint_path(directory, before)} is damaged, and none before it is whole. "
        raise CheckpointError(others + nothing_complete(directory))
    return choice.iteration, read_record(checkpoint_path(directory, choice.iteration))
