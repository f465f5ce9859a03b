"""Whose own work takes longest, and what is said of it."""

from __future__ import annotations

import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.health.heartbeat import FOLDER, read_beats
from megatron_rmipo.health.link_report import LINKS_FILE
from megatron_rmipo.health.pace import HOST, RANK, SHARE, slowest_rank
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.reports.progress_line import ProgressLine
from megatron_rmipo.torchrun import launch_for_messages
from megatron_rmipo.training import main as trainer
from tests.harness import run_distributed
from tests.integration.data import write_pairs
from tests.integration.test_training import flags


def test_a_rank_is_held_against_the_median_of_its_stage() -> None:
    # The last stage has the output layer, too.
    found = slowest_rank([(1.0, 0), (1.1, 0), (1.4, 0), (3.0, 1), (3.0, 1), (3.1, 1)])
    assert (found.rank, found.seconds) == (2, pytest.approx(0.3))
    assert slowest_rank([(2.0, 0), (5.0, 1)]).seconds == 0.0
    assert slowest_rank([(2.0, 0), (2.5, 0)]).rank == 1


def test_the_progress_line_names_it_where_it_costs_a_tenth_of_the_step() -> None:
    for share, is_named in ((0.04, False), (0.31, True)):
        stream = io.StringIO()
        ProgressLine(stream, 9).show("train", {"step": 4, SHARE: share, RANK: 13}, {HOST: "node1"})
        assert ("| slowest rank 13 (node1) +31%" in stream.getvalue()) == is_named


def train_with_a_slow_rank(arguments: list[str]) -> int:
    forward = PolicyModel.forward

    def late(self: PolicyModel, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return forward(self, *args, **kwargs)

    if launch_for_messages().rank == 1:
        PolicyModel.forward = late  # type: ignore[method-assign]
    return trainer.main(arguments)


@pytest.mark.dist
def test_a_run_names_the_rank_that_is_slow_and_says_what_each_did_last(tmp_path: Path) -> None:
    save = tmp_path / "save"
    prefix = write_pairs(tmp_path / "data" / "pairs")
    arguments = flags(prefix, save, split=None, train_iters=6, check_links=True, tensorboard_dir=tmp_path / "board")
    assert run_distributed(train_with_a_slow_rank, 2, arguments) == [0, 0]
    lines = (save / "logs" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert len(steps) == 6
    # A busy host may hold the other one up in a step, not in most of them.
    named = [record for record in steps if record[RANK] == 1]
    assert len(named) > 3
    assert all(record[HOST] != "" for record in named)
    # The other rank waits for most of the step.
    assert 0.2 < statistics.median(record[SHARE] for record in named) < 1.0
    assert statistics.median(record[SHARE] * record["step_seconds"] for record in named) > 0.3
    beats = read_beats(save / "logs" / FOLDER)
    assert [(beat.rank, beat.step, beat.doing) for beat in beats] == [(0, 6, "end"), (1, 6, "end")]
    assert {one["kind"] for one in json.loads((save / "logs" / LINKS_FILE).read_text())} == {"dp", "world"}
