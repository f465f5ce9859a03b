"""The walk through a run of many ranks: what it counts, by hand, and when it says that something grows."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_scale, scale_stages
from benchmarks.large_data import make_large_data
from benchmarks.scale_world import CountedStore, FileLooks, Layout, Measured, Traffic, pretended_world
from megatron_rmipo.data.store.pair_store import PairStore

LENGTHS = np.array([[5, 3, 4], [7, 2, 9], [6, 11, 1]])
SMALL = {"vocab_size": 203, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
ARGUMENTS = ["--batch-size", "6", "--pairs", "20", "40", "--layouts", "2x2x2", "2x2x8", "--json"]


def test_large_data_are_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PairStore(make_large_data(tmp_path, 17, LENGTHS))
    drawn = [row.tolist() for row in LENGTHS]
    assert len(whole) == 17
    assert all(row in drawn for row in whole.lengths.tolist())
    assert len(np.unique(whole.lengths, axis=0)) == 3
    pair = whole[16]
    assert [len(pair.prompt), len(pair.chosen), len(pair.rejected)] == whole.lengths[16].tolist()
    assert pair.rejected.sum() == 0
    monkeypatch.setattr("benchmarks.large_data.PAIRS_AT_A_TIME", 5)
    (tmp_path / "parts").mkdir()
    assert len(PairStore(make_large_data(tmp_path / "parts", 17, LENGTHS))) == 17


def test_collectives_are_counted_at_the_least_that_they_move() -> None:
    with pretended_world(Layout(1, 1, 5), 4) as groups, Traffic() as traffic:
        assert (groups.dp_size, groups.dp_rank) == (5, 4)
        dist.all_reduce(torch.zeros(7, dtype=torch.float64), group=groups.dp)
        assert traffic.moved_bytes == 2 * 7 * 8
        told: list[Any] = [None] * 5
        dist.all_gather_object(told, {"a": 1}, group=groups.dp)
        assert told == [{"a": 1}] * 5
        assert traffic.moved_bytes == 2 * 7 * 8 + 6 * len(pickle.dumps({"a": 1}))
    assert not dist.is_initialized()
    assert dist.all_reduce is not traffic._all_reduce


def test_the_store_counts_by_rank_and_files_are_counted(tmp_path: Path) -> None:
    store = CountedStore()
    store.set("key", "value")
    store.rank = 3
    assert store.get("key") == b"value"
    assert store.get("unsaid") == b"null"
    assert [store.add("n", 1), store.add("n", 1)] == [1, 2]
    assert store.moved_bytes == {0: 8, 3: 8 + 10 + 4}
    (tmp_path / "a").write_text("a")
    with FileLooks() as looks:
        assert (tmp_path / "a").exists()
        (tmp_path / "a").read_text()
        list(tmp_path.iterdir())
    (tmp_path / "a").read_text()
    assert looks.count == 3


def test_a_walk_and_what_grows_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_stages, "LLAMA_3_70B", scale_stages.LLAMA_3_70B | SMALL)
    assert bench_scale.main([*ARGUMENTS, "--csv", str(tmp_path / "a.csv")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["goals"] == [], "of these settings"
    rows = {row["stage"]: row for row in told["rows"]}
    assert rows["order of a batch"]["pairs_large"] == 40

    def ratio(stage: str, figure: str) -> float:
        return float(rows[stage][f"{figure}_2x2x8"]) / float(rows[stage][f"{figure}_2x2x2"])

    # Eight ranks, then thirty-two; one of eight looks, at two files a rank and a few more.
    flags = "flags and environment compared"
    assert ratio(flags, "moved_bytes") < 1.0, "more ranks share the telling of the facts"
    assert 3.0 < ratio(f"{flags}: the first rank", "moved_bytes") < 4.5
    assert rows["the checkpoint looked for"]["files_2x2x8"] > 2 * 32 / 8
    assert rows["the checkpoint looked for"]["files_2x2x8"] < 2 * 32 / 4
    dealt, told = rows["who writes what is dealt, at a first save"], rows["what a save wrote told: the first rank"]
    assert dealt["number_2x2x8"] < dealt["number_2x2x2"], "a smaller stretch of the optimizer's state"
    assert told["number_2x2x2"] < told["number_2x2x8"] < 4 * told["number_2x2x2"], "cut at more places"
    for stage in ("a step's metrics gathered", "keys of a load compared"):
        assert ratio(stage, "moved_bytes") == 1.0, stage
    assert rows["process groups made"]["number_2x2x8"] > rows["process groups made"]["number_2x2x2"]


def test_growth_that_need_not_be_is_missed() -> None:
    before, twice, sixteen = Measured(0.1, 1, 10.0, 3.0), Measured(0.1, 1, 20.0, 3.0), Measured(0.1, 1, 160.0, 3.0)
    stages = ["its record read: one rank of a host", "keys of a load compared", *bench_scale.STARTING]
    same = dict.fromkeys(stages, before)
    options = bench_scale.parse_options([])
    held = bench_scale.goals(options, {bench_scale.SMALLER: same, bench_scale.LARGER: same}, {})
    assert {goal.name: goal.reached for goal in held}["scale, start-up of a rank of 1,024: CPU s"]
    assert all(goal.reached for goal in held)
    grown = same | {"its record read: one rank of a host": sixteen, "keys of a load compared": twice}
    held = bench_scale.goals(options, {bench_scale.SMALLER: same, bench_scale.LARGER: grown}, {})
    assert [goal.name for goal in held if not goal.reached] == [
        "scale, keys of a load compared: bytes moved, 1,024 ranks over 64"
    ]


def test_start_up_at_sixty_million_pairs_is_held() -> None:
    stages = dict.fromkeys([*bench_scale.OPENING, *bench_scale.BATCH], Measured(0.01, 10**6))
    heavy = stages | {"order of a batch": Measured(6.0, 10**6), "the largest pair found": Measured(0.01, 10**9)}
    options = bench_scale.parse_options([])
    for found, missed in ((stages, []), (heavy, ["start-up: peak bytes", "a batch of 1,024: CPU s"])):
        held = bench_scale.goals(options, {}, {"1000000": stages, "60000000": found})
        assert [goal.name.partition("pairs, ")[2] for goal in held if not goal.reached] == missed
