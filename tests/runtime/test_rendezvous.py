"""Two ranks that meet, agree or not, fail or stay away."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rmipo.errors import DataError, RmipoError
from megatron_rmipo.runtime.agreement import describe_difference, digest_of
from megatron_rmipo.runtime.rendezvous import Rendezvous
from tests.harness import run_distributed

FACTS: dict[str, Any] = {"--lr": 1e-3, "--data-path": ["A"], "name": None, "tokens of A": "f0"}


def outcome_of(rendezvous: Rendezvous, facts: dict[str, Any]) -> str:
    try:
        rendezvous.compare(facts)
    except RmipoError as error:
        return f"{type(error).__name__}: {error}"
    return "agreed"


def fail_alone(error: Exception | None, rank: int = 1) -> str:
    """What a rank ends with if one fails between two meetings."""
    try:
        with Rendezvous() as rendezvous:
            rendezvous.compare(FACTS)
            if rendezvous.launch.rank == rank and error is not None:
                raise error
            rendezvous.compare(FACTS)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "agreed"


def meet() -> dict[str, str]:
    rendezvous = Rendezvous()
    second = rendezvous.launch.rank == 1
    outcomes = {"same": outcome_of(rendezvous, FACTS)}
    outcomes["order"] = outcome_of(rendezvous, dict(reversed(FACTS.items())) if second else FACTS)
    outcomes["one"] = outcome_of(rendezvous, {**FACTS, "--lr": 2e-3} if second else FACTS)
    outcomes["absent"] = outcome_of(rendezvous, {**FACTS, "NVTE_X": "1"} if second else FACTS)
    outcomes["many"] = outcome_of(rendezvous, dict.fromkeys(FACTS, "other") if second else FACTS)
    outcomes["again"] = outcome_of(rendezvous, FACTS)
    outcomes["fault"] = fail_alone(DataError("A.bin: missing"))
    outcomes["bug"] = fail_alone(ZeroDivisionError("by zero"))
    outcomes["none"] = fail_alone(None)
    rendezvous.timeout_minutes = 0.02
    if second:
        time.sleep(2.5)
    outcomes["late"] = outcome_of(rendezvous, FACTS)
    return outcomes


def look(folder: Path) -> dict[str, Any]:
    """What looks of each kind give on this rank, and how often it looked itself at first."""
    rendezvous, looked = Rendezvous(), []

    def find() -> dict[str, Any]:
        looked.append(rendezvous.launch.rank)
        return {"rank": rendezvous.launch.rank, "path": folder, "iteration": (3, None)}

    def fail(error: Exception) -> None:
        raise error

    def told(name: str, action: Callable[[], Any]) -> Any:
        try:
            return rendezvous.look_once(name, action)
        except (RmipoError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"

    rendezvous.compare(FACTS)
    found: dict[str, Any] = {"same": told("same", find), "again": told("same", find), "times": len(looked)}
    found["fault"] = told("fault", lambda: fail(DataError("A.bin: missing")))
    found["bug"] = told("bug", lambda: fail(ZeroDivisionError("by zero")))
    (folder / str(rendezvous.launch.rank)).mkdir()
    os.chdir(folder / str(rendezvous.launch.rank))
    found["apart"] = told("apart", find)
    os.chdir(folder)
    rendezvous.timeout_minutes = 0.01
    found["late"] = told("late", lambda: time.sleep(1.5))
    if found["late"] is not None:
        # This may be the rank that holds the store.
        time.sleep(1.5)
    rendezvous.connect()
    found["unknown"] = told("unknown", find)
    found["remembered"] = told("same", find)
    return found


@pytest.mark.dist
def test_one_rank_of_a_host_looks_and_tells_the_others(tmp_path: Path) -> None:
    ranks = run_distributed(look, 2, tmp_path)
    of = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    assert of["same"][0] == of["same"][1]
    assert of["same"] == of["again"] == of["remembered"]
    assert sum(of["times"]) == 1
    assert of["same"][0]["iteration"] == [3, None], "as JSON holds it, on the rank that looked, too"
    assert of["fault"] == ["DataError: A.bin: missing"] * 2
    assert sorted(of["bug"]) == ["RmipoError: ZeroDivisionError: by zero", "ZeroDivisionError: by zero"]
    assert None in of["late"]
    assert any("did not tell what it found of late within 0.01 minutes" in str(late) for late in of["late"])
    # Other directories, other files under the same path; and ranks that are connected meet no more.
    assert [one["rank"] for one in of["apart"]] == [one["rank"] for one in of["unknown"]] == [0, 1]


@pytest.mark.dist
def test_all_ranks_end_alike() -> None:
    first, second = run_distributed(meet, 2)
    assert second.pop("bug") == "ZeroDivisionError: by zero", "a fault of ours keeps its own kind where it happened"
    told = first.pop("bug")
    assert first == second
    assert told.startswith("RmipoError: rank 1 (")
    assert "cannot start, so no rank does: ZeroDivisionError: by zero" in told
    assert {name for name, text in first.items() if text == "agreed"} == {"same", "order", "again", "none"}
    assert "--lr is 0.001 on rank 0 (" in first["one"]
    assert "but 0.002 on rank 1 (" in first["one"]
    assert "more differ" not in first["one"]
    assert "NVTE_X is not set on rank 0 (" in first["absent"]
    assert "3 more differ: --data-path, name, tokens of A." in first["many"]
    assert first["fault"].startswith("DataError: rank 1 (")
    assert first["fault"].endswith("cannot start, so no rank does: A.bin: missing")
    assert first["late"].startswith("RmipoError: rank 1 of 2 did not come to the start of the run within 0.02 minutes")


def test_a_process_alone_agrees_with_itself_and_keeps_its_fault() -> None:
    assert fail_alone(None) == "agreed"
    assert fail_alone(DataError("as it was"), rank=0) == "DataError: as it was"


def test_a_digest_knows_values_and_not_their_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})
    assert digest_of({"a": None}) != digest_of({})


def test_long_values_are_cut() -> None:
    text = describe_difference({"a": "x" * 999}, {"a": ""}, "rank 0 (h)", "rank 1 (i)")
    assert len(text) < 500
    assert "but empty on rank 1 (i)" in text


def test_ranks_that_are_started_anew_hear_nothing_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dist.HashStore()  # as torchrun keeps one with --master-addr
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(kept, 0, 2)]))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    heard = []
    for restarts in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        store = Rendezvous().connect()
        heard.append(store.check(["said"]))
        store.set("said", "the first rank is at another place by now")
    assert heard == [False] * 3
