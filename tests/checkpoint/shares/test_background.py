"""Writers beside the training: they end with their rank, and one that is ended is told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_rmipo.checkpoint.shares.background import BackgroundWrite
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.runtime.cpu import install_cpu_runtime
from tests.data.orphans import count_files, workers_left_by
from tests.harness import run_distributed


def write_without_end(folder: Path) -> None:
    (folder / "begun").touch()
    time.sleep(600)


def wait_for(write: BackgroundWrite) -> None:
    while not write.finish_if_written():
        time.sleep(0.01)


def train_beside_a_write(folder: Path) -> None:
    install_cpu_runtime()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    wait_for(BackgroundWrite(AsyncRequest(write_without_end, (folder,), []), dist.group.WORLD))


def test_a_write_in_the_background_ends_with_a_killed_rank(tmp_path: Path) -> None:
    assert not workers_left_by(train_beside_a_write, tmp_path, when=lambda: count_files(tmp_path) == 1)


def end_of(write: BackgroundWrite) -> str:
    """What is told once a write has ended."""
    with pytest.raises(CheckpointError) as told:
        wait_for(write)
    write.abandon()
    return str(told.value)


def end_writers() -> list[str]:
    install_cpu_runtime()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    killed = AsyncRequest(lambda: os.kill(os.getpid(), signal.SIGKILL), (), [])
    fallen = AsyncRequest(os._exit, (3,), [])
    return [end_of(BackgroundWrite(request, dist.group.WORLD)) for request in (killed, fallen)]


def test_a_writer_that_is_ended_is_told() -> None:
    killed, fallen = run_distributed(end_writers, 1)[0]
    assert killed.endswith("of rank 0 ended by signal 9, as happens where the host's memory runs out")
    assert fallen.endswith("of rank 0 ended with exit code 3")
