"""The rank that fails first, of two."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rmipo.command import FAULT_OF_OURS
from megatron_rmipo.errors import DataError
from megatron_rmipo.runtime import first_failure as first_failure_module
from megatron_rmipo.runtime.first_failure import claim_first_failure, first_failure, tell_failure
from megatron_rmipo.runtime.groups import initialize_runtime
from megatron_rmipo.scoring import score_cli
from megatron_rmipo.training import main as trainer
from tests.harness import run_distributed


def fail_in_turn() -> tuple[str | None, bool, bool, str | None, float]:
    initialize_runtime()
    rank = int(os.environ["RANK"])
    before = first_failure()
    dist.barrier()
    if rank == 0:
        # The other one is given the time to be first.
        while first_failure() is None:
            time.sleep(0.01)
    found = before, claim_first_failure(f"rank {rank}"), claim_first_failure("again"), first_failure()
    start = time.monotonic()
    tell_failure(DataError(f"pair {rank}"), debug=False)
    waited = time.monotonic() - start
    # The first rank keeps the store.
    dist.barrier()
    return *found, waited


@pytest.mark.dist
def test_the_first_is_told_to_all() -> None:
    found = run_distributed(fail_in_turn, 2)
    assert [told[:4] for told in found] == [(None, False, False, "rank 1"), (None, True, True, "rank 1")]
    # torchrun ends the first one once another has left: that tells, and leaves, later.
    assert found[0][4] >= first_failure_module._SILENT_SECONDS


def test_without_other_ranks_everyone_is_first() -> None:
    assert not dist.is_initialized()
    assert claim_first_failure("alone")
    assert first_failure() is None


@pytest.mark.parametrize("command", ["trainer", "score_pairs"])
def test_a_command_whose_peer_failed_says_so_and_other_faults_are_raised(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    causes: list[str | None] = ["rank 1 ran out of memory", None, "rank 1 ran out of memory"]

    def fail(*anything: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(first_failure_module, "first_failure", lambda: causes.pop(0))
    monkeypatch.setattr(trainer, "run_training", fail)
    monkeypatch.setattr(score_cli, "score", fail)
    run = trainer.main if command == "trainer" else score_cli.main
    arguments = ["--load-hf", "model"]
    assert run(arguments) == 1
    assert capsys.readouterr().err == "stopped, since rank 1 ran out of memory\n"
    for flags in ([], ["--debug"]):
        with pytest.raises(RuntimeError, match="closed by peer"):
            run([*arguments, *flags])


@pytest.mark.parametrize(
    "error", [RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), dist.DistError("x")]
)
def test_a_rank_that_is_lost_and_told_nothing_is_said_to_be_gone(error: RuntimeError, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell_failure(error, debug=False) == FAULT_OF_OURS
    told = capsys.readouterr().err
    assert told.startswith("stopped, since another rank is gone, or did not answer within --distributed-timeout-minutes")
    assert str(error) in told
    with pytest.raises(RuntimeError):
        tell_failure(error, debug=True)


def test_a_fault_of_the_user_is_left_for_the_ranks_that_lose_this_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[str] = []

    def claim(text: str) -> bool:
        left.append(text)
        return True

    monkeypatch.setattr(first_failure_module, "claim_first_failure", claim)
    tell_failure(DataError("pair 3: no\nMake it anew."), debug=False)
    assert left == ["DataError: pair 3: no"]
    assert capsys.readouterr().err == "DataError: pair 3: no\nMake it anew.\n"
