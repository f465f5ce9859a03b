"""Links between ranks: what is measured, and who is named where one is slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rmipo.health.link_report import LINKS_FILE, check_links, describe_slow, link_table, slow_links, slow_ranks
from megatron_rmipo.health.links import ALL_REDUCE, NEIGHBOURS, Measured, _rounds
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_every_neighbour_is_met_once_and_no_rank_twice_in_a_round(size: int) -> None:
    rounds = [list(_rounds(size, rank)) for rank in range(size)]
    met = set()
    for links in zip(*rounds, strict=True):
        for rank, link in enumerate(links):
            if link != (None, None):
                assert rank in link
                assert links[link[0]] == links[link[1]] == link
                met.add(link)
    assert met == ({(0, 1)} if size == 2 else {(rank, (rank + 1) % size) for rank in range(size)})


def _ring(size: int, slow_rank: int | None, hosts: int = 1, kind: str = "dp") -> list[Measured]:
    names = [f"node{rank * hosts // size}" for rank in range(size)]
    found = []
    for rank in range(size):
        pair = rank, (rank + 1) % size
        crosses = names[pair[0]] != names[pair[1]]
        seconds = (0.02 if crosses else 0.005) * (9 if slow_rank in pair else 1)
        found.append(Measured(kind, NEIGHBOURS, pair, (names[pair[0]], names[pair[1]]), seconds, 10**6))
    return found


@pytest.mark.parametrize("size", [3, 4, 7])
def test_the_rank_both_of_whose_links_are_slow_is_named(size: int) -> None:
    measured = _ring(size, 1)
    slow = slow_links(measured)
    assert {one.measured.ranks for one in slow} == {(0, 1), (1, 2 % size)}
    assert slow_ranks(measured, slow) == [1]
    assert describe_slow(measured, slow)[0].startswith("rank 1 on node0 is slow")


def test_a_network_is_not_held_against_links_within_a_host() -> None:
    assert slow_links(_ring(8, None, hosts=4)) == []


def test_of_two_ranks_that_have_one_link_none_is_accused() -> None:
    pairs = [Measured("tp", NEIGHBOURS, (rank, rank + 1), ("a", "a"), 0.05 if rank == 2 else 0.004, 10**6) for rank in (0, 2, 4)]
    slow = slow_links(pairs)
    assert [one.measured.ranks for one in slow] == [(2, 3)]
    assert slow_ranks(pairs, slow) == []
    assert "ranks 2, 3 (a) took 50.00 ms, 12.5 times the median" in describe_slow(pairs, slow)[0]


def test_the_table_has_a_line_for_each_kind() -> None:
    group = Measured("world", ALL_REDUCE, (0, 1, 2, 3), ("a", "a", "b", "b"), 0.01, 10**6)
    head, links, between, world = link_table([*_ring(4, None, hosts=2), group])
    assert "median ms" in head
    assert links.split()[:4] == ["data", "parallel", "send_recv", "within"]
    assert "between hosts" in between
    # An all-reduce of G ranks moves 2 (G - 1) / G of the data over each link.
    assert (world.split()[-2], group.bytes_per_second) == ("0.15", 1.5e8)


def measure(log_dir: Path, slow_rank: int) -> dict[str, Any]:
    """At DP 2 x PP 2, one rank late to each exchange by a sleep."""
    groups = initialize_runtime(1, 2)
    exchange = dist.batch_isend_irecv

    def late(works: Any) -> Any:
        time.sleep(0.05)
        return exchange(works)

    if groups.rank == slow_rank:
        dist.batch_isend_irecv = late
    said: list[str] = []
    warned: list[str] = []
    check_links(groups, log_dir, said.append, warned.append)
    shutdown_runtime()
    return {"said": said, "warned": warned}


@pytest.mark.dist
def test_a_rank_that_is_slow_is_named_by_real_ranks(tmp_path: Path) -> None:
    found = run_distributed(measure, 4, tmp_path / "logs", 2)
    first = found[0]
    assert all(one == {"said": [], "warned": []} for one in found[1:])
    assert {line.partition("  ")[0] for line in first["said"][1:]} == {"pipeline stages", "data parallel", "all ranks"}
    assert first["warned"][0].startswith("rank 2 on ")
    assert not any(line.startswith(f"rank {rank} on ") for line in first["warned"] for rank in (0, 1, 3))
    assert any(line.startswith("pipeline stages: send_recv of ranks 0, 2 ") for line in first["warned"])
    entries = json.loads((tmp_path / "logs" / LINKS_FILE).read_text())
    assert {(one["kind"], one["what"]) for one in entries} == {
        (kind, what) for kind in ("pp", "dp", "world") for what in (ALL_REDUCE, NEIGHBOURS)
    }
