"""What ranks tell each other of what went wrong, what that costs, and what one rank does alone while the others wait."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rmipo.errors import DataError, RmipoError
from megatron_rmipo.runtime import agreement
from megatron_rmipo.runtime.agreement import gather_faults, is_same, on_each_rank_alone, on_every_rank, on_first_rank
from megatron_rmipo.runtime.first_failure import lost_a_rank
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed


def tell() -> dict[str, Any]:
    groups = initialize_runtime()
    real, told = dist.all_gather_object, []

    def counted(*args: Any, **kwargs: Any) -> None:
        told.append(1)
        real(*args, **kwargs)

    dist.all_gather_object = counted  # type: ignore[assignment]
    second = groups.rank == 1

    def fail() -> None:
        if second:
            raise DataError("A.bin: missing")

    found: dict[str, Any] = {"value": on_every_rank(groups.world, lambda: groups.rank), "none": gather_faults(groups.world, None)}
    found["objects where nothing is wrong"] = len(told)
    found["same"] = [is_same(groups.world, facts) for facts in ({"a": 1, "b": [2]}, {"a": groups.rank}, {"a": -groups.rank})]
    found["one"] = gather_faults(groups.world, "torn" if second else None)
    found["falsy"] = gather_faults(groups.world, "" if not second else None)
    try:
        on_every_rank(groups.world, fail)
    except RmipoError as error:
        found["raised"] = f"{type(error).__name__}: {error}"
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_faults_of_one_rank_are_told_to_all_and_nothing_else_is() -> None:
    first, second = run_distributed(tell, 2)
    assert [first.pop("value"), second.pop("value")] == [0, 1]
    assert first == second
    assert first["objects where nothing is wrong"] == 0
    assert (first["none"], first["one"], first["falsy"]) == ([], [(1, "torn")], [(0, "")])
    assert first["same"] == [True, False, False]
    assert first["raised"] == "DataError: A.bin: missing"


TIMEOUT_SECONDS = 2.0


def start() -> dist.ProcessGroup:
    """A group that waits for seconds; the ranks may take longer to come."""
    agreement._LIFE_SECONDS = 0.3
    initialize_runtime()
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS))
    assert group is not None
    return group


def slowly(rank: int, result: Any = None, error: Exception | None = None) -> Any:
    if dist.get_rank() == rank:
        time.sleep(1.3 * TIMEOUT_SECONDS)
    if error is not None:
        raise error
    return result


def wait_for_slow_ranks() -> list[Any]:
    group = start()
    found = [on_first_rank(group, lambda: slowly(0, "first"))]
    for error in (DataError("no such row"), OSError("no space")):
        with pytest.raises(RmipoError) as raised:
            on_first_rank(group, lambda error=error: slowly(3, error=error))  # type: ignore[misc]
        found.append((type(raised.value).__name__, str(raised.value)))
    found.append(on_each_rank_alone(group, lambda: slowly(1, dist.get_rank())))
    with pytest.raises(DataError, match="of rank 1"):
        on_each_rank_alone(group, lambda: slowly(3, error=DataError("of rank 1") if dist.get_rank() else None))
    # Parts of the ranks, each with a first rank of its own.
    parts = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS)) for ranks in ([1, 2], [0])]
    found.append(on_first_rank(parts[dist.get_rank() == 0], lambda: slowly(min(dist.get_rank(), 1), dist.get_rank())))
    started = time.perf_counter()
    for number in range(50):
        assert on_first_rank(group, lambda number=number: number) == number  # type: ignore[misc]
        assert on_every_rank(group, lambda: 7) == 7
    found.append(time.perf_counter() - started)
    shutdown_runtime()
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_wait_for_one_that_works_longer_than_the_timeout() -> None:
    for rank, found in enumerate(run_distributed(wait_for_slow_ranks, 3)):
        *told, seconds = found
        failures = [("DataError", "no such row"), ("CheckpointError", "no space")]
        assert told == ["first", *failures, rank, min(rank, 1)]
        assert seconds < 5.0


def lose_the_first_rank(blow: int) -> tuple[bool, float]:
    group = start()
    started = time.monotonic()
    try:
        on_first_rank(group, lambda: os.kill(os.getpid(), blow))
    except RuntimeError as error:
        return lost_a_rank(error), time.monotonic() - started
    raise AssertionError("nobody missed it")


def end_of_a_lost_first_rank(blow: int) -> tuple[bool, float]:
    """On rank 1 what it saw; rank 0 is a child that is killed or stands still, so that the harness does not see it end."""
    if os.environ["RANK"] == "0":
        child = os.fork()
        if child == 0:
            lose_the_first_rank(blow)
        time.sleep(3 * TIMEOUT_SECONDS)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return True, 0.0
    return lose_the_first_rank(blow)


@pytest.mark.dist
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_first_rank_that_is_gone_or_stands_still_ends_the_wait(blow: int) -> None:
    is_lost, seconds = run_distributed(end_of_a_lost_first_rank, 2, blow)[1]
    assert is_lost
    assert seconds < 2 * TIMEOUT_SECONDS


def test_signs_of_life_go_to_the_device_of_the_rank_and_not_of_their_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    own, others, met = torch.device("cpu"), torch.device("meta"), threading.Event()
    devices: list[torch.device] = []

    def meet(device: torch.device) -> None:
        devices.append(device)
        if threading.current_thread() is not threading.main_thread():
            met.set()

    # As CUDA does: what another thread asks for is the first device.
    is_main = lambda: threading.current_thread() is threading.main_thread()  # noqa: E731
    monkeypatch.setattr(agreement, "device_of", lambda _: own if is_main() else others)
    monkeypatch.setattr(agreement, "_LIFE_SECONDS", 0.01)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told, *, device, **_: meet(device))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: meet(tensor.device))
    for together in (on_first_rank, on_each_rank_alone):
        met.clear()
        assert together(group, lambda: met.wait(30)), together
    assert set(devices) == {own}
