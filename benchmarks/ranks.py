"""A function on several gloo ranks of this machine, for benchmarks that need real ones."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` gave on each rank of a fresh world, by rank.

    It is a module-level function, and sets up its own groups from the environment, as under torchrun.

    Raises:
        SystemExit: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench_ranks_") as name, socket.socket() as probe:
        probe.bind(("localhost", 0))
        port, folder = probe.getsockname()[1], Path(name)
        probe.close()
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, size, port, folder, function, arguments)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"of {size} ranks one failed; nothing measured")
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


def _rank(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    (folder / str(rank)).write_bytes(pickle.dumps(function(*arguments)))
