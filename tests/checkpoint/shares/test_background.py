from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_rmipo.checkpoint.shares.background import BackgroundWrite
from megatron_rmipo.runtime.cpu import install_cpu_runtime
from tests.data.orphans import count_files, workers_left_by


def write_without_end(folder: Path) -> None:
    (folder / "begun").touch()
    time.sleep(600)


def train_beside_a_write(folder: Path) -> None:
    install_cpu_runtime()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    write = BackgroundWrite(AsyncRequest(write_without_end, (folder,), []))
    while not write.finish_if_written():
        time.sleep(0.1)


def test_a_write_in_the_background_ends_with_a_killed_rank(tmp_path: Path) -> None:
    assert not workers_left_by(train_beside_a_write, tmp_path, when=lambda: count_files(tmp_path) == 1)
