"""What a save leaves of the checkpoints that were there: branches that were left, older ones, runs that die in between."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.megatron.commit import prune_checkpoints, write_best
from megatron_rmipo.checkpoint.megatron.directory import (
    TRACKER_NAME,
    checkpoint_path,
    find_checkpoint,
    latest_complete_iteration,
)
from megatron_rmipo.checkpoint.whole_directories import wait_for_removals
from megatron_rmipo.errors import CheckpointError
from tests.checkpoint.megatron.test_directory import write


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


def test_pruning_leaves_the_checkpoint_of_the_best_evaluation(tmp_path: Path) -> None:
    for iteration in (4, 8, 12):
        write(tmp_path, iteration)
    write_best(tmp_path, 4)
    prune_checkpoints(tmp_path, 1, newest=12)
    assert names(tmp_path) == ["iter_0000004", "iter_0000012"]
    assert find_checkpoint(tmp_path, "best") == (checkpoint_path(tmp_path, 4), 4)
    write_best(tmp_path, None)
    prune_checkpoints(tmp_path, 1, newest=12)
    assert names(tmp_path) == ["iter_0000012"]
    with pytest.raises(CheckpointError, match=r"is missing or says nothing: no run with --keep-best"):
        find_checkpoint(tmp_path, "best")


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


def test_pruning_keeps_the_newest_and_the_one_in_use(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        write(tmp_path, iteration)
    prune_checkpoints(tmp_path, 2, newest=4, in_use=checkpoint_path(tmp_path, 1) / "hf")
    assert names(tmp_path) == ["iter_0000001", "iter_0000003", "iter_0000004"]
    wait_for_removals()
    assert not list(tmp_path.glob(".*"))


def test_pruning_waits_for_no_removal_and_tells_what_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in (1, 2, 3):
        write(tmp_path, iteration)
    may_go_on, at_work, most_at_work = threading.Event(), [0], [0]

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        at_work[0] += 1
        most_at_work[0] = max(most_at_work[0], at_work[0])
        assert may_go_on.wait(20)
        at_work[0] -= 1
        if not ignore_errors:
            raise PermissionError(13, "not yours")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    prune_checkpoints(tmp_path, 2, newest=3)
    prune_checkpoints(tmp_path, 1, newest=3)
    assert names(tmp_path) == ["iter_0000003"]
    assert latest_complete_iteration(tmp_path) == 3
    may_go_on.set()
    wait_for_removals()
    assert most_at_work == [1]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(".iter_000000" in line and "not yours" in line and "Remove it by hand" in line for line in told)
