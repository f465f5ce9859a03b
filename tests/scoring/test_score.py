"""What is missing of scores is the same on every rank, and so is the end of a pass whose first rank cannot write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import ScoreWriter
from megatron_rmipo.data.store.row_set import RowSet
from megatron_rmipo.errors import DataError
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.scoring.score import _Keeper, find_missing, plan_scores
from tests.harness import run_distributed
from tests.integration.data import write_pairs

DONE = [3, 20]


def look_and_write(prefix: str) -> dict[str, Any]:
    """Rows that are missing of rows 3, 4, 41 and of all, before and after 3 and 20 are scored, and how a full disk is told."""
    groups, store = initialize_runtime(), PairStore(prefix)
    tasks = plan_scores([store], reference="reference", bf16=False, cache=None, groups=groups)
    wanted, asked = RowSet(len(store)), []
    wanted.add(np.array([41, 3, 4]))

    def needed() -> dict[str, RowSet]:
        asked.append(groups.rank)
        return {prefix: wanted}

    def missing(*given: Any) -> list[tuple[list[int], int]]:
        found = find_missing(tasks, groups, *given)
        return [([row for block in one.rows.blocks(5) for row in block.tolist()], one.num_needed) for one in found]

    found: dict[str, Any] = {"before": [missing(needed), missing()]}
    task = tasks[0]
    with _Keeper(task, groups) as keeper:
        keeper.write(np.array(DONE), np.full((2, 2), -7.0, dtype=np.float32))
        keeper.flush()
    found["after"] = [missing(needed), missing()]
    full = OSError(errno.ENOSPC, "No space left on device")
    with _Keeper(task, groups) as keeper, mock.patch.object(os, "pwrite", side_effect=full):
        for row in (5, 6):
            keeper.write(np.array([row]), np.full((1, 2), -7.0, dtype=np.float32))
        try:
            keeper.flush()
        except DataError as error:
            found["full"] = str(error)
    if groups.rank == 0:
        with ScoreWriter(task.directory, task.key, len(store)) as writer:
            writer.write(np.arange(len(store)), np.full((len(store), 2), -7.0, dtype=np.float32))
    asked_before = len(asked)
    found["all"] = missing(needed)
    found["asked"], found["asked where all are there"] = set(asked), len(asked) - asked_before
    pairs = PairCollection([store])
    pairs.reference_scores = [task.open()]
    found["sum"] = float(pairs.scores_of(np.arange(48)).sum())
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_ranks_agree_on_what_is_missing_and_on_a_disk_that_is_full(tmp_path: Path) -> None:
    ranks = run_distributed(look_and_write, 2, str(write_pairs(tmp_path / "pairs")))
    for rank, found in enumerate(ranks):
        others = [row for row in range(48) if row not in DONE]
        assert found["before"] == [[([3, 4, 41], 3)], [(list(range(48)), 48)]]
        assert found["after"] == [[([4, 41], 3)], [(others, 48)]]
        assert "No space left on device" in found["full"]
        assert found["all"] == []
        # The first rank alone works out which rows are needed, and not where all are there.
        assert (found["asked"], found["asked where all are there"]) == ({0} if rank == 0 else set(), 0)
        assert found["sum"] == -7.0 * 96
