"""What ranks tell each other of what went wrong, and what it costs where nothing did."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from megatron_rmipo.errors import DataError, RmipoError
from megatron_rmipo.runtime.agreement import gather_faults, is_same, on_every_rank
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
