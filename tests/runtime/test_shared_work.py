"""Work that ranks do at the same time, here threads that share a store."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rmipo.runtime import shared_work
from megatron_rmipo.runtime.shared_work import Halt, SharedWork

PATIENCE_SECONDS = 0.6


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SharedWork]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(datetime.timedelta(seconds=PATIENCE_SECONDS))
    monkeypatch.setattr(shared_work, "connecting_store", lambda: store)
    monkeypatch.setattr(shared_work, "_LOOK_SECONDS", 0.05)

    def begin(rank: int, size: int, stop: Any = None) -> SharedWork:
        group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: size)
        return SharedWork("pairs", group, title="writing", total_bytes=1000, stop=stop)

    return begin


def finish_all(works: list[SharedWork], *, late: Callable[[], None] = lambda: None) -> list[Any]:
    """What each rank's :meth:`finish` gave or raised; the last one comes after ``late``."""

    def finish(work: SharedWork) -> Any:
        if work is works[-1]:
            late()
        try:
            return work.finish()
        except dist.DistStoreError as error:
            return str(error)

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(finish, works))


def test_ranks_wait_for_a_slow_one_as_long_as_it_gets_further(start: Callable[..., SharedWork]) -> None:
    works = [start(rank, 3) for rank in range(3)]

    def work_slowly() -> None:
        for _ in range(12):
            works[-1].add(10)
            time.sleep(PATIENCE_SECONDS / 6)
            assert works[-1].goes_on()

    assert finish_all(works, late=work_slowly) == [None] * 3


def test_a_rank_that_gets_no_further_ends_the_wait(start: Callable[..., SharedWork]) -> None:
    works = [start(rank, 3) for rank in range(2)]
    assert finish_all(works) == [f"no rank got further within {PATIENCE_SECONDS:.0f} seconds"] * 2


def test_the_first_failure_is_what_all_ranks_are_told(start: Callable[..., SharedWork]) -> None:
    works = [start(rank, 3) for rank in range(3)]
    works[1].halt(Halt("failed", "no space"))
    works[2].halt(Halt("failed", "no space either"))
    assert not works[0].goes_on()
    assert finish_all(works) == [Halt("failed", "no space")] * 3


def test_a_signal_halts_all_ranks_until_the_last_is_through(start: Callable[..., SharedWork]) -> None:
    stop = SimpleNamespace(received=False)
    works = [start(0, 2, stop), start(1, 2)]

    def receive() -> None:
        time.sleep(0.1)
        stop.received = True
        while works[-1].goes_on():
            time.sleep(0.01)

    assert finish_all(works, late=receive) == [Halt("stopped", "")] * 2
    stop.received = False


def test_who_waits_for_a_lost_rank_is_told(start: Callable[..., SharedWork]) -> None:
    works = [start(rank, 3) for rank in range(2)]
    works[0].halt(Halt("lost", "[rank 0] RuntimeError: closed by peer"))
    assert finish_all(works[1:]) == ["[rank 0] RuntimeError: closed by peer"]
