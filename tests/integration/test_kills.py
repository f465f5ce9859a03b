"""Ranks that are killed, stopped or told to end at any moment: what is left, and how the next start goes on."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import pytest
import torch
import torch.multiprocessing as mp

from megatron_rmipo import entry
from megatron_rmipo.checkpoint.megatron.directory import latest_complete_iteration
from megatron_rmipo.command import FAULT_OF_OURS, STOPPED
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.scoring import score
from tests.harness import free_port
from tests.integration.data import write_pairs
from tests.integration.test_training import flags, losses, records, weights

RANKS = 2


class Blow(NamedTuple):
    """A signal that a rank sends to itself.

    Attributes:
        rank: which.
        place: ``module:attribute``, a function of the trainer.
        call: at which call of it in this process, counted from 1.
        after: when it has returned; else before.
        number: the signal.
    """

    rank: int
    place: str
    call: int
    after: bool = False
    number: int = signal.SIGKILL


STEP = "megatron_rmipo.training.loop:train_step"
EVALUATION = "megatron_rmipo.training.course.evaluation:evaluate_batch"
SAVE = "megatron_rmipo.checkpoint.megatron.store:CheckpointSaver.save"
WRITING = "megatron_rmipo.checkpoint.megatron.store:dist_checkpointing.save"
COMMIT = "megatron_rmipo.checkpoint.megatron.store:commit_checkpoint"
RENAME = "megatron_rmipo.checkpoint.megatron.commit:os.replace"
PRUNE = "megatron_rmipo.checkpoint.megatron.store:prune_checkpoints"
# Looked for only with --async-save.
WRITTEN = "megatron_rmipo.checkpoint.shares.background:BackgroundWrite.finish_if_written"
SCORING = "megatron_rmipo.scoring.score:_score_block"
EXPORT = "megatron_rmipo.checkpoint.makers:export_hf"
EXPORTING = "megatron_rmipo.checkpoint.hf.gathering:join_shards"


def _strike_at(blow: Blow) -> None:
    """Wrap the function so that the blow falls when it is called."""
    module_name, path = blow.place.split(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def struck(*args: Any, **named: Any) -> Any:
        # os.replace is everybody's.
        calls[0] += blow.place != RENAME or "iter_" in str(args) or "latest_checkpointed" in str(args)
        if calls[0] == blow.call and not blow.after:
            os.kill(os.getpid(), blow.number)
        result = original(*args, **named)
        if calls[0] == blow.call and blow.after:
            os.kill(os.getpid(), blow.number)
        return result

    setattr(owner, name, struck)


def _rank(rank: int, port: int, arguments: Sequence[str], blow: Blow | None, output: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    with output.open("a") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    # Several blocks of scores, though there are few pairs.
    score.ROWS_PER_WRITE = 5
    if blow is not None and blow.number == signal.SIGSTOP:
        # Bounded is the wait for a rank that stands still, not that for one which a busy host starts late.
        Rendezvous.timeout_minutes = property(lambda _: 5.0, lambda *_: None)  # type: ignore[assignment]
    if blow is not None and blow.rank == rank:
        _strike_at(blow)
    sys.argv = ["train", *arguments]
    raise SystemExit(entry.train())


def _wait_until_stopped(process: Any) -> None:
    """How long a busy host takes to bring a rank so far is not what is looked at."""
    deadline = time.monotonic() + 300
    while process.is_alive() and psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def start(arguments: Sequence[str], folder: Path, blow: Blow | None = None, timeout: float = 120) -> tuple[list[int | None], str]:
    """Exit code of each rank (minus the signal that ended it), and what both wrote.

    They have ``timeout`` seconds for it, from the moment on in which one stands still.
    """
    context, port = mp.get_context("forkserver"), free_port()
    outputs = [folder / f"rank{rank}.txt" for rank in range(RANKS)]
    for output in outputs:
        output.write_text("")
    ranks: list[Any] = [context.Process(target=_rank, args=(rank, port, arguments, blow, outputs[rank])) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    # A rank that stands still ends when it is killed.
    stands_still = {blow.rank} if blow is not None and blow.number == signal.SIGSTOP else set()
    for rank in stands_still:
        _wait_until_stopped(ranks[rank])
    deadline = time.monotonic() + timeout
    for process in (process for rank, process in enumerate(ranks) if rank not in stands_still):
        process.join(max(0.0, deadline - time.monotonic()))
    hung = {rank for rank, process in enumerate(ranks) if process.is_alive()} - stands_still
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    told = "\n".join(output.read_text() for output in outputs)
    assert not hung, f"ranks {hung} did not end\n{told}"
    return [process.exitcode for process in ranks], told


def kill_table() -> list[Blow]:
    """Blows, in an order in which each finds something left to kill; ranks and calls are drawn with a seed."""
    drawn = random.Random(20)
    places = [
        *[(SCORING, call, after) for call, after in ((1, False), (2, True))],
        *[(EVALUATION, call, False) for call in (1, 2)],
        *[(STEP, call, after) for call, after in ((1, False), (1, True), (2, False), (3, True))],
        *[(SAVE, 1, False), (SAVE, 1, True), (WRITING, 1, False), (WRITING, 1, True)],
        *[(COMMIT, 1, False), (RENAME, 1, False), (RENAME, 1, True), (RENAME, 2, True), (COMMIT, 1, True), (PRUNE, 1, True)],
        *[(WRITTEN, 1, False), (WRITTEN, 3, True)],
        *[(EXPORT, 1, False), (EXPORTING, 5, False)],
    ]
    by_first_rank = (COMMIT, RENAME, PRUNE, EXPORT, EXPORTING)
    return [Blow(0 if place in by_first_rank else drawn.randrange(RANKS), place, call, after) for place, call, after in places]


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "data" / "pairs")
    settings: dict[str, Any] = {
        "objective": "dpo",
        "train_iters": 40,
        "save_interval": 2,
        "eval_interval": 4,
        "keep_last": 2,
        "global_batch_size": 4,
        "tokens_per_microbatch": 900,
        "use_distributed_optimizer": True,
        "save_hf": None,
    }
    whole = tmp_path / "whole"
    undisturbed = flags(prefix, whole, **{**settings, "load": whole, "save_hf": tmp_path / "whole-hf"})
    codes, told = start([*undisturbed, "--reference-cache", str(tmp_path / "whole-scores")], tmp_path)
    assert codes == [0, 0], told
    save = tmp_path / "parts"
    arguments = flags(prefix, save, **{**settings, "load": save, "save_hf": tmp_path / "parts-hf"})
    for number, blow in enumerate(kill_table()):
        beside = ["--async-save"] if number % 2 or blow.place == WRITTEN else []
        before = latest_complete_iteration(save) if save.is_dir() else None
        codes, told = start([*arguments, *beside], tmp_path, blow)
        assert codes[blow.rank] == -signal.SIGKILL, f"{blow} did not fall\n{told}"
        assert codes[1 - blow.rank] not in (None, 0, STOPPED), f"{blow}: the other rank took it for an end\n{told}"
        if before is not None:
            assert f"step {before} of {save}" in told, f"{blow}\n{told}"
    codes, told = start(arguments, tmp_path)
    assert codes == [0, 0], told
    assert losses(save) == losses(whole)
    assert [record["loss"] for record in records(save, "eval")][-1] == records(whole, "eval")[-1]["loss"]
    first, second = weights(tmp_path / "whole-hf"), weights(tmp_path / "parts-hf")
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The one that the last training start went on from lends it its tokenizer, and stays as well.
    kept = {path.name for path in save.glob("iter_*")}
    assert {"iter_0000038", "iter_0000040"} <= kept, kept
    assert len(kept) <= 3, kept


@pytest.mark.dist
@pytest.mark.parametrize("place", [STEP, WRITING])
def test_a_rank_that_stands_still_ends_the_others_within_the_timeout(place: str, tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "data" / "pairs"), tmp_path / "run"
    arguments = flags(prefix, save, save_interval=2, train_iters=4, split=None, distributed_timeout_minutes=0.1)
    codes, told = start(arguments, tmp_path, Blow(1, place, 2 if place == STEP else 1, number=signal.SIGSTOP), timeout=90)
    # The last step that both were in.
    assert max(losses(save)) == (1 if place == STEP else 2), told
    assert codes[0] == FAULT_OF_OURS, told
    assert "Traceback" not in told
    assert "imed out" in told, told


@pytest.mark.dist
def test_a_signal_while_a_checkpoint_is_written_lets_it_be_finished(tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "data" / "pairs"), tmp_path / "run"
    arguments = flags(prefix, save, save_interval=2, train_iters=400, split=None)
    codes, told = start(arguments, tmp_path, Blow(1, WRITING, 1, number=signal.SIGTERM))
    assert codes == [STOPPED, STOPPED], told
    reached = max(losses(save))
    assert latest_complete_iteration(save) == reached < 400, told
    assert not list(save.glob("*.incomplete*")), told
