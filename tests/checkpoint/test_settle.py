"""The damage table: which checkpoint a run goes on from when a file of the newest is not what was written, and what is said."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.checkpoint import settle
from megatron_rmipo.checkpoint.megatron import digests
from megatron_rmipo.checkpoint.megatron.common_state import is_written_as_object
from megatron_rmipo.checkpoint.megatron.directory import TRACKER_NAME, read_tracker
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.source import checkpoint_source
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.checkpoint.models import flip_bit, write_checkpoint, write_hf_model
from tests.harness import run_distributed

pytestmark = pytest.mark.dist

FILES = [".metadata", "metadata.json", "__0_0.distcp", "__0_1.distcp", "hf/config.json", "rmipo.json"]
if not is_written_as_object():
    FILES.append("common.pt")
DAMAGES = ["missing", "truncated", "bit", "another's"]
# These are the same in both iterations.
SAME = {("metadata.json", "another's"), ("hf/config.json", "another's")}
# What the tracker file holds -> the iteration that is taken of 4 and 8, and what is said.
TRACKERS: dict[str | None, tuple[int | None, str]] = {
    "8": (8, ""),
    "4": (4, ""),
    "": (8, "is missing or says nothing"),
    None: (8, "is missing or says nothing"),
    "eight": (8, "is missing or says nothing"),
    "7": (4, "names 7, which is not there"),
    "99": (8, "names 99, which is not there"),
    "3": (None, "8, 4 can be loaded: to take one, write its name into"),
}


def spoil(directory: Path, name: str, damage: str) -> None:
    path = directory / "iter_0000008" / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "bit":
        flip_bit(path)
    else:
        shutil.copyfile(directory / "iter_0000004" / name, path)


def settle_all(original: Path, folder: Path) -> dict[Any, tuple[int | None, str]]:
    """Every case in a copy of its own: what is taken, or None, and what was said."""
    groups = initialize_runtime()
    outcomes: dict[Any, tuple[int | None, str]] = {}

    def outcome(directory: Path) -> tuple[int | None, str]:
        said: list[str] = []
        settle.warn = said.append  # type: ignore[assignment]
        try:
            with DirectoryOwner(directory) as owner:
                found = settle.settle_source(partial(checkpoint_source, directory), groups, verify=True, owner=owner)
        except CheckpointError as error:
            return None, "\n".join([*said, str(error)])
        assert found.checked
        assert read_tracker(directory) == found.iteration, "the tracker file names what is gone on from"
        return found.iteration, "\n".join(said)  # type: ignore[return-value]

    cases = [(name, damage) for name in FILES for damage in DAMAGES] + list(TRACKERS)
    for number, case in enumerate(cases):
        directory = folder / str(number)
        shutil.copytree(original, directory)
        if isinstance(case, tuple):
            spoil(directory, *case)
        elif case is None:
            (directory / TRACKER_NAME).unlink()
        else:
            (directory / TRACKER_NAME).write_text(case)
        outcomes[case] = outcome(directory)
    shutdown_runtime()
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[int | None, str]]:
    folder = tmp_path_factory.mktemp("damage")
    hf = write_hf_model(folder / "hf", "llama32_tied")
    for iteration in (4, 8):
        write_checkpoint(folder / "run", iteration, hf)
    result: dict[Any, tuple[int | None, str]] = run_distributed(settle_all, 1, folder / "run", folder)[0]
    return result


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_the_newest_is_named_and_the_one_before_taken(
    outcomes: dict[Any, tuple[int | None, str]], name: str, damage: str
) -> None:
    taken, said = outcomes[name, damage]
    if (name, damage) in SAME:
        assert (taken, said) == (8, "")
    else:
        assert taken == 4, said
        assert name in said
        assert "iter_0000008" in said


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_tracker_file_is_followed_or_passed_over_aloud(outcomes: dict[Any, tuple[int | None, str]], tracker: str) -> None:
    taken, words = TRACKERS[tracker]
    assert outcomes[tracker][0] == taken
    assert words in outcomes[tracker][1]
    assert bool(words) == bool(outcomes[tracker][1])


def settle_together(directory: Path) -> tuple[Any, ...]:
    """On two ranks: what differs on rank 1 does not count; then a file that it does not see; then nothing whole is left."""
    groups = initialize_runtime()
    said: list[str] = []
    settle.warn = said.append  # type: ignore[assignment]

    def settled() -> Any:
        # Rank 1 is late, and sees only what was there before.
        find = partial(checkpoint_source, directory, None if groups.rank == 0 else 4)
        try:
            return settle.settle_source(find, groups, verify=True).iteration
        except CheckpointError as error:
            return str(error)

    taken = settled()
    seen, digests.is_seen = digests.is_seen, lambda path, deadline: groups.rank == 0
    unseen = settled()
    digests.is_seen = seen
    if groups.rank == 0:
        flip_bit(directory / "iter_0000004" / "__0_1.distcp")
    groups.world.barrier().wait()
    lost = settled()
    shutdown_runtime()
    return taken, unseen, lost, said


def test_ranks_take_what_the_first_one_chose(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "llama32_tied")
    for iteration in (4, 8):
        write_checkpoint(tmp_path / "run", iteration, hf)
    flip_bit(tmp_path / "run" / "iter_0000008" / "__0_0.distcp", seed=5)
    results = run_distributed(settle_together, 2, tmp_path / "run")
    assert [taken for taken, *_ in results] == [4, 4]
    for _, unseen, lost, _ in results:
        assert "rank 1 on" in unseen
        assert "does not see" in unseen
        assert "iter_0000004 is damaged, and none before it is whole" in lost
    assert "__0_0.distcp does not hold what was written" in results[0][3][0]
    assert results[1][3] == [], "one rank speaks for all"
