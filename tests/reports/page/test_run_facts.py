"""What a run writes of itself for its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.reports.page.run_facts import (
    add_facts,
    commit_of_package,
    histograms,
    launcher_words,
    read_facts,
    write_facts,
)
from megatron_rmipo.torchrun import Launch
from tests.integration.problem import collection, make_pairs, unpaired


def test_a_run_that_goes_on_adds_its_start_and_a_new_one_begins_anew(tmp_path: Path) -> None:
    first, second = ({"time": "t", "step": step, "command": "c"} for step in (0, 20))
    write_facts(tmp_path, {"layout": "a"}, first)
    write_facts(tmp_path, {"layout": "b"}, second)
    add_facts(tmp_path, {"early_stop": "why"})
    assert read_facts(tmp_path) == {"layout": "b", "starts": [first, second], "early_stop": "why"}
    write_facts(tmp_path, {"layout": "c"}, first)
    assert read_facts(tmp_path) == {"layout": "c", "starts": [first]}
    (tmp_path / "run.json").write_text("{")
    assert read_facts(tmp_path) == {}


def test_histograms_count_every_part_that_a_row_has() -> None:
    pairs = unpaired(make_pairs())
    found = histograms(collection(pairs))
    lengths = np.array([[pair.prompt.size, pair.chosen.size, pair.rejected.size] for pair in pairs])
    step = found["step"]
    assert found["counted"] == len(pairs)
    for number, part in enumerate(("prompt", "chosen", "rejected")):
        for place, count in enumerate(found[part]):
            inside = (lengths[:, number] > place * step) & (lengths[:, number] <= (place + 1) * step)
            assert count == inside.sum()
        assert sum(found[part]) == (lengths[:, number] > 0).sum()


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (Launch(), "python -m megatron_rmipo.train"),
        (Launch(world_size=2, local_world_size=2), "torchrun --nproc-per-node 2 -m megatron_rmipo.train"),
        (Launch(world_size=16, local_world_size=8), "torchrun --nnodes 2 --nproc-per-node 8 -m megatron_rmipo.train"),
    ],
)
def test_the_command_is_that_of_the_launch(launch: Launch, words: str) -> None:
    assert " ".join(launcher_words(launch)) == words


def test_the_commit_is_a_whole_one_or_none() -> None:
    commit = commit_of_package()
    assert commit is None or len(commit.split()[0]) == 40
