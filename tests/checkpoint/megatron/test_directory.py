"""Which checkpoint of a directory is the one to go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.megatron.commit import begin_checkpoint, commit_checkpoint
from megatron_rmipo.checkpoint.megatron.directory import (
    RANDOM_KEY,
    TRACKER_NAME,
    checkpoint_path,
    fault_of,
    find_checkpoint,
    latest_complete_iteration,
)
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, read_record
from megatron_rmipo.errors import CheckpointError
from tests.checkpoint.models import write_checkpoint, write_hf_model


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


def test_ours_without_a_record_is_incomplete_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    sibling = write(tmp_path / "run", 3)
    path = write_checkpoint(tmp_path / "run", 4, write_hf_model(tmp_path / "hf", "llama32_tied"))
    kept = (sibling / "rmipo.json").rename(tmp_path / "kept")
    (path / "rmipo.json").unlink()
    assert fault_of(path) == "rmipo.json is missing"
    # Nor does it need its own traces where others of the run lie beside it.
    metadata = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(metadata.replace(RANDOM_KEY.encode(), b"x" * len(RANDOM_KEY)))
    assert fault_of(path) is None
    kept.rename(sibling / "rmipo.json")
    assert fault_of(path) == "rmipo.json is missing"
    assert latest_complete_iteration(tmp_path / "run") == 3
