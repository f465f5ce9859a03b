"""Writing into a directory of checkpoints: one appears whole or not at all, and none is lost to another branch of the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_rmipo.checkpoint.megatron.directory import BEST_NAME, TRACKER_NAME, checkpoint_path, iterations_of, read_tracker
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, Iteration, write_record
from megatron_rmipo.checkpoint.whole_directories import discard, partial_path, sync_directory
from megatron_rmipo.runtime.messages import warn

_SET_ASIDE_SUFFIX = ".set_aside"


def begin_checkpoint(directory: Path, iteration: Iteration) -> Path:
    """Make the folder to write a checkpoint in, under a name that no other process takes."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = partial_path(checkpoint_path(directory, iteration))
    partial.mkdir()
    return partial


def commit_checkpoint(partial: Path, record: CheckpointRecord, digests: Mapping[str, str] | None = None) -> Path:
    """Give a folder of :func:`begin_checkpoint`, now filled, its name, and make it the one to go on from.

    Iterations beyond the one that the tracker file named until now are of a branch that was left, or damaged. They are set aside
    under another name, and that is said.

    Args:
        partial: the folder.
        record: of the checkpoint.
        digests: as :func:`megatron_rmipo.checkpoint.megatron.record.write_record` takes them.

    Returns:
        The checkpoint's path.
    """
    directory, iteration = partial.parent, record.iteration
    path = checkpoint_path(directory, iteration)
    write_record(partial, record, digests or {})
    sync_directory(partial)
    _set_branch_aside(directory, iteration)
    # Before the checkpoint has its name: a run that dies in between finds none of this name and takes the one before. The other
    # way round, the tracker file would name an older one that is there, as it does when a user goes back to it.
    write_tracker(directory, iteration)
    os.replace(partial, path)
    sync_directory(directory)
    return path


def write_tracker(directory: Path, iteration: Iteration, name: str = TRACKER_NAME) -> None:
    """Name the checkpoint to go on from. The file is replaced in one step."""
    tracker = partial_path(directory / name)
    with tracker.open("w", encoding="utf-8") as stream:
        stream.write(str(iteration))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(tracker, directory / name)
    sync_directory(directory)


def write_best(directory: Path, iteration: int | None) -> None:
    """Name the checkpoint of the best evaluation, which pruning leaves; None for no such one. In one step."""
    if iteration is None:
        (directory / BEST_NAME).unlink(missing_ok=True)
    else:
        write_tracker(directory, iteration, BEST_NAME)


def abandon_checkpoint(partial: Path) -> None:
    """Remove what was written of a checkpoint that failed, in the background."""
    discard(partial)


def prune_checkpoints(directory: Path, keep_last: int, newest: int, in_use: Path | None = None) -> None:
    """Remove older iterations, so that ``newest`` and those before it are ``keep_last``.

    They lose their names at once, and are removed in the background. One that cannot be removed is told with a warning.

    Args:
        directory: the directory of checkpoints.
        keep_last: how many to keep.
        newest: the one just committed, which is never removed, nor are ``release`` and that of the best evaluation.
        in_use: a path; the iteration it lies in stays, too.
    """
    assert keep_last >= 1, keep_last
    older = sorted(iteration for iteration in iterations_of(directory) if iteration < newest)
    best = read_tracker(directory, BEST_NAME)
    for iteration in older[: max(0, len(older) - keep_last + 1)]:
        path = checkpoint_path(directory, iteration)
        if iteration != best and (in_use is None or path.resolve() not in in_use.resolve().parents):
            discard(path)


def _set_branch_aside(directory: Path, iteration: Iteration) -> None:
    tracked = read_tracker(directory)
    if iteration == "release":
        return
    head = 0 if tracked == "release" else iteration if tracked is None else min(tracked, iteration)
    for other in sorted(iterations_of(directory)):
        if other > head or other == iteration:
            path = checkpoint_path(directory, other)
            aside, number = path.with_name(path.name + _SET_ASIDE_SUFFIX), 2
            while aside.exists():
                aside, number = path.with_name(f"{path.name}{_SET_ASIDE_SUFFIX}_{number}"), number + 1
            os.replace(path, aside)
            warn(f"{path} is set aside as {aside.name}: this run went on from step {head}. Remove it if it is not wanted.")
