"""Which checkpoint of a directory is the one to go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.megatron.commit import begin_checkpoint, commit_checkpoint, prune_checkpoints
from megatron_rmipo.checkpoint.megatron.directory import (
    TRACKER_NAME,
    checkpoint_path,
    fault_of,
    find_checkpoint,
    latest_complete_iteration,
)
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, read_record
from megatron_rmipo.errors import CheckpointError


def write(directory: Path, iteration: int, content: str = "weights") -> Path:
    partial = begin_checkpoint(directory, iteration)
    (partial / "__0_0.distcp").write_text(content)
    return commit_checkpoint(partial, CheckpointRecord(iteration, {"step": iteration}))


def test_latest_is_the_tracked_one(tmp_path: Path) -> None:
    assert latest_complete_iteration(tmp_path / "none") is None
    for iteration in (5, 12):
        write(tmp_path, iteration)
    assert (tmp_path / TRACKER_NAME).read_text() == "12"
    assert latest_complete_iteration(tmp_path) == 12
    record = read_record(checkpoint_path(tmp_path, 12))
    assert record is not None
    assert (record.train_state, record.files) == ({"step": 12}, {"__0_0.distcp": 7})
    (tmp_path / TRACKER_NAME).write_text("5\n")
    assert latest_complete_iteration(tmp_path) == 5


@pytest.mark.parametrize("damage", ["truncate", "remove", "no_record", "half_record"])
def test_incomplete_is_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 5)
    path = write(tmp_path, 12)
    if damage == "truncate":
        (path / "__0_0.distcp").write_text("wei")
    elif damage == "remove":
        (path / "__0_0.distcp").unlink()
    elif damage == "no_record":
        (path / "rmipo.json").unlink()
    else:
        (path / "rmipo.json").write_text('{"format_version": 1, "iter')
    assert fault_of(path) is not None
    assert latest_complete_iteration(tmp_path) == 5
    with pytest.raises(CheckpointError, match=r"iter_0000012 cannot be loaded.*5, 12"):
        find_checkpoint(tmp_path, 12)


def test_run_that_died_while_writing(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (begin_checkpoint(tmp_path, 12) / "__0_0.distcp").write_text("wei")
    assert latest_complete_iteration(tmp_path) == 5
    with DirectoryOwner(tmp_path):
        write(tmp_path, 13)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000005", "iter_0000013", TRACKER_NAME]


def test_written_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 5)
    path = write(tmp_path, 5, "other weights")
    assert (path / "__0_0.distcp").read_text() == "other weights"
    assert fault_of(path) is None


def test_nothing_complete_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    begin_checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"iter_0000003\..*\.incomplete: was being written"):
        find_checkpoint(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Name its parent"):
        find_checkpoint(tmp_path)


def test_pruning_keeps_the_newest_and_the_one_in_use(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        write(tmp_path, iteration)
    prune_checkpoints(tmp_path, 2, newest=4, in_use=checkpoint_path(tmp_path, 1) / "hf")
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000003", "iter_0000004"]
