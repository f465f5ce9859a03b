"""Which checkpoint of a directory is the one to go on from."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_rmipo.checkpoint.megatron.commit import begin_checkpoint, commit_checkpoint, prune_checkpoints
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
from megatron_rmipo.checkpoint.verify_checkpoint_cli import main as verify
from megatron_rmipo.errors import CheckpointError
from tests.checkpoint.models import flip_bit, write_checkpoint, write_hf_model


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


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("iter_*"))


def test_a_branch_that_was_left_is_set_aside_and_never_taken_or_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (4, 8, 12):
        write(tmp_path, iteration, f"first branch, {iteration}")
    (tmp_path / TRACKER_NAME).write_text("4")
    assert latest_complete_iteration(tmp_path) == 4
    write(tmp_path, 6)
    assert names(tmp_path) == ["iter_0000004", "iter_0000006", "iter_0000008.set_aside", "iter_0000012.set_aside"]
    said = capsys.readouterr().err
    assert "iter_0000012 is set aside as iter_0000012.set_aside: this run went on from step 4" in said
    assert (tmp_path / TRACKER_NAME).read_text() == "6"
    write(tmp_path, 8)
    prune_checkpoints(tmp_path, 1, newest=8)
    assert names(tmp_path) == ["iter_0000008", "iter_0000008.set_aside", "iter_0000012.set_aside"]
    # Once more from the same step: nothing that was set aside is overwritten.
    write(tmp_path, 12)
    (tmp_path / TRACKER_NAME).write_text("8")
    write(tmp_path, 10)
    assert (tmp_path / "iter_0000012.set_aside" / "__0_0.distcp").read_text() == "first branch, 12"
    assert (tmp_path / "iter_0000012.set_aside_2").is_dir()
    assert latest_complete_iteration(tmp_path) == 10
    shutil.rmtree(tmp_path / "iter_0000010")
    assert latest_complete_iteration(tmp_path) == 8


def test_pruning_never_removes_what_was_just_committed(tmp_path: Path) -> None:
    for iteration in (4, 8, 12):
        write(tmp_path, iteration)
    prune_checkpoints(tmp_path, 2, newest=8)
    assert names(tmp_path) == ["iter_0000004", "iter_0000008", "iter_0000012"]
    prune_checkpoints(tmp_path, 1, newest=8)
    assert names(tmp_path) == ["iter_0000008", "iter_0000012"]


@pytest.mark.parametrize("dies_at", range(4))
def test_a_run_that_dies_while_it_commits_goes_on_from_the_newest_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    for iteration in (4, 8):
        write(tmp_path, iteration)
    # A branch is left, too: 8 must not come back.
    (tmp_path / TRACKER_NAME).write_text("4")
    replace, renames = os.replace, []

    def count(source: Path, target: Path) -> None:
        if len(renames) == dies_at:
            raise KeyboardInterrupt
        renames.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", count)
    try:
        write(tmp_path, 6)
        outcome = 6
    except KeyboardInterrupt:
        outcome = 4
    assert renames == ["iter_0000008.set_aside", TRACKER_NAME, "iter_0000006"][:dies_at]
    assert latest_complete_iteration(tmp_path) == outcome


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


@pytest.mark.parametrize(("spoil", "words"), [(None, "no digests"), ("flip", "does not have its checksum")])
def test_verify_tells_of_every_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str | None, words: str
) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama32_tied")
    for iteration in (4, 8):
        path = write_checkpoint(tmp_path / "run", iteration, hf)
    assert verify([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("digests right") == 2
    flip_bit(path / "hf" / "config.json")
    assert verify([str(tmp_path / "run")]) == 1
    assert verify([str(tmp_path / "run"), "--iteration", "4"]) == 0
    said = capsys.readouterr()
    assert re.search(r"iter_0000004: complete, readable, \d+ files of 0.0 MiB, digests right", said.out)
    assert "iter_0000008: NOT WHOLE:" in said.out
    assert "hf/config.json does not hold what was written" in said.out
    assert "1 of 2 checkpoints" in said.err
    # Without digests the archives have checksums of their own.
    record = json.loads((path / "rmipo.json").read_text())
    for name in ("digest", "digests", "written_by"):
        del record[name]
    (path / "rmipo.json").write_text(json.dumps({**record, "format_version": 1}))
    if spoil:
        data = bytearray((path / "__0_0.distcp").read_bytes())
        at = data.index(torch.randn((3, 5, 7), generator=torch.Generator().manual_seed(8))[0, 1].numpy().tobytes())
        data[at] ^= 1
        (path / "__0_0.distcp").write_bytes(data)
    assert verify([str(tmp_path / "run"), "--iteration", "8"]) == (1 if spoil else 0)
    assert words in capsys.readouterr().out
    (tmp_path / "run" / TRACKER_NAME).write_text("5")
    assert verify([str(tmp_path / "run")]) == 1
    assert "names 5, which is not there" in capsys.readouterr().err
