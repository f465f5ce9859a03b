from __future__ import annotations

import time
from pathlib import Path

from megatron_rmipo.checkpoint.shares.hashed_writes import HashedWrites
from tests.data.orphans import count_files, workers_left_by


def save_without_end(folder: Path) -> None:
    with HashedWrites():
        (folder / "begun").touch()
        time.sleep(600)


def test_what_gathers_the_writers_results_ends_with_a_killed_rank(tmp_path: Path) -> None:
    assert not workers_left_by(save_without_end, tmp_path, when=lambda: count_files(tmp_path) == 1)
